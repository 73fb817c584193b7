"""Families that store coefficients of a transform: WaveFT and FourierFT.

WaveFT: `waveft_spectrum` [n]. The positions of the coefficients follow from `random_loc_seed` and the weight's size.
The config names the wavelet.

The filters in this module are low-pass reconstruction filters. `FILTERS` contains exactly PEFT's values. Daubechies
published the filters (Ten Lectures on Wavelets, https://doi.org/10.1137/1.9781611970104). Except for PEFT's coif4 (see
`FAULTY`), the filters are orthonormal, dbN and symN have N vanishing moments, and coifN has 2N.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ....errors import SAVE_WITH_PEFT, USE_ITS_BASE, Malformed, ShapeMismatch, Unsupported
from ....io.lazy import DTYPES, Lazy, as_lazy
from ....methods._coefficients import SEED
from ....methods.fourierft import FourierFT
from ....methods.waveft import WaveFT
from ..._format import Departure
from ..file import DecodedUpdate, File, Key, make
from ..patterns import exactly, first_match
from . import Family, MethodFields, Parts
from ._weights import check_size, layout, not_linear, side, size_at, size_fields, unlike, weight_shape

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue
    from ..file import Key


FAULTY = "coif4"
"""The wavelet whose filter is wrong in PEFT: PEFT's values do not form a wavelet. `RIGHT` has the correct values."""

RIGHT = (
    0.000892313902537003, -0.001629492425226786, -0.007346167936268051, 0.01606894713157503,
    0.02668230466960483, -0.08126671024919373, -0.05607731960356926, 0.41530842700068227,
    0.7822389344242826, 0.43438603311435653, -0.06662747236681717, -0.09622042453595264,
    0.03933442260558915, 0.02508225333794961, -0.015211728187697211, -0.0056582838001308835,
    0.0037514346971460866, 0.0012665610789256603, -0.0005890202246332165, -0.0002599743371222568,
    6.233885431278719e-05, 3.1229861599195265e-05, -3.259647940030751e-06, -1.7849909144933469e-06,
)  # fmt: skip
"""The correct filter of coif4, the Coiflet with 8 vanishing moments."""

FILTERS: dict[str, tuple[float, ...]] = {
    "db1": (
        0.7071067811865476, 0.7071067811865476,
    ),
    "db2": (
        0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037,
    ),
    "db3": (
        0.33267055295008263, 0.8068915093133388, 0.4598775021193313, -0.13501102001039084, -0.08544127388224149,
        0.035226291882100656,
    ),
    "db4": (
        0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854, -0.18703481171909309,
        0.030841381835560764, 0.0328830116668852, -0.010597401785069032,
    ),
    "db5": (
        0.16010239797419293, 0.6038292697971896, 0.7243085284377729, 0.13842814590132074, -0.24229488706638203,
        -0.032244869584638375, 0.07757149384004572, -0.006241490212798274, -0.012580751999081999,
        0.0033357252854737712,
    ),
    "db6": (
        0.11154074335010947, 0.49462389039845306, 0.7511339080210954, 0.31525035170919763, -0.22626469396543983,
        -0.12976686756726194, 0.09750160558732304, 0.027522865530305727, -0.03158203931748603, 0.0005538422011614961,
        0.004777257510945511, -0.0010773010853084796,
    ),
    "db7": (
        0.07785205408500918, 0.3965393194819173, 0.7291320908462351, 0.4697822874051931, -0.14390600392856498,
        -0.22403618499387498, 0.07130921926683026, 0.08061260915108308, -0.03802993693501441, -0.01657454163066688,
        0.01255099855609984, 0.0004295779729213665, -0.0018016407040474908, 0.00035371379997452024,
    ),
    "db8": (
        0.05441584224310401, 0.31287159091429995, 0.6756307362972898, 0.5853546836542067, -0.015829105256349306,
        -0.2840155429615469, 0.0004724845739132828, 0.12874742662047847, -0.017369301001807547, -0.044088253930794755,
        0.013981027917398282, 0.008746094047405777, -0.004870352993451574, -0.00039174037337694705,
        0.0006754494064505693, -0.00011747678412476953,
    ),
    "db9": (
        0.038077947363878345, 0.24383467461259034, 0.6048231236901112, 0.6572880780513005, 0.13319738582500756,
        -0.2932737832791749, -0.09684078322297646, 0.14854074933810638, 0.03072568147933338, -0.06763282906132997,
        0.00025094711483145197, 0.022361662123679096, -0.004723204757751397, -0.00428150368246343,
        0.0018476468830562265, 0.00023038576352319597, -0.0002519631889427101, 3.93473203162716e-05,
    ),
    "db10": (
        0.026670057900555554, 0.1881768000776915, 0.5272011889317256, 0.6884590394536035, 0.2811723436605775,
        -0.24984642432731538, -0.19594627437737705, 0.12736934033579325, 0.09305736460357235, -0.07139414716639708,
        -0.029457536821875813, 0.033212674059341, 0.0036065535669561697, -0.010733175483330575, 0.001395351747052901,
        0.001992405295185056, -0.0006858566949597116, -0.00011646685512928545, 9.358867032006959e-05,
        -1.3264202894521244e-05,
    ),
    "sym2": (
        0.48296291314469025, 0.836516303737469, 0.22414386804185735, -0.12940952255092145,
    ),
    "sym3": (
        0.3326705529509569, 0.8068915093133388, 0.4598775021193313, -0.13501102001039084, -0.08544127388224149,
        0.035226291882100656,
    ),
    "sym4": (
        0.0322231006040427, -0.012603967262037833, -0.09921954357684722, 0.29785779560527736, 0.8037387518059161,
        0.49761866763201545, -0.02963552764599851, -0.07576571478927333,
    ),
    "sym5": (
        0.019538882735286728, -0.021101834024758855, -0.17532808990845047, 0.01660210576452232, 0.6339789634582119,
        0.7234076904024206, 0.1993975339773936, -0.039134249302383094, 0.029519490925774643, 0.027333068345077982,
    ),
    "sym6": (
        -0.007800708325034148, 0.0017677118642428036, 0.04472490177066578, -0.021060292512300564,
        -0.07263752278646252, 0.3379294217276218, 0.787641141030194, 0.4910559419267466, -0.048311742585633,
        -0.11799011114819057, 0.0034907120842174702, 0.015404109327027373,
    ),
    "sym7": (
        0.010268176708511255, 0.004010244871533663, -0.10780823770381774, -0.14004724044296152, 0.2886296317515146,
        0.767764317003164, 0.5361019170917628, 0.017441255086855827, -0.049552834937127255, 0.0678926935013727,
        0.03051551316596357, -0.01263630340325193, -0.0010473848886829163, 0.002681814568257878,
    ),
    "sym8": (
        0.0018899503327594609, -0.0003029205147213668, -0.01495225833704823, 0.003808752013890615,
        0.049137179673607506, -0.027219029917056003, -0.05194583810770904, 0.3644418948353314, 0.7771857517005235,
        0.4813596512583722, -0.061273359067658524, -0.1432942383508097, 0.007607487324917605, 0.03169508781149298,
        -0.0005421323317911481, -0.0033824159510061256,
    ),
    "sym9": (
        0.0010694900329086053, -0.0004731544986800831, -0.010264064027633142, 0.008859267493400484,
        0.06207778930288603, -0.018233770779395985, -0.19155083129728512, 0.035272488035271894, 0.6173384491409358,
        0.717897082764412, 0.238760914607303, -0.05456895843083407, 0.0005834627461258068, 0.03022487885827568,
        -0.01152821020767923, -0.013271967781817119, 0.0006197808889855868, 0.0014009155259146807,
    ),
    "sym10": (
        -0.0004593294210046588, 5.7036083618494284e-05, 0.004593173585311828, -0.0008043589320165449,
        -0.02035493981231129, 0.005764912033581909, 0.04999497207737669, -0.0319900568824278, -0.03553674047381755,
        0.38382676106708546, 0.7695100370211071, 0.47169066693843925, -0.07088053578324385, -0.15949427888491757,
        0.011609893903711381, 0.0459272392310922, -0.0014653825813050513, -0.008641299277022422,
        9.563267072289475e-05, 0.0007701598091144901,
    ),
    "coif1": (
        -0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578, -0.07273261951252645,
        -0.015655728135791993,
    ),
    "coif2": (
        0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629, 0.8127236354494135,
        0.4170051844232391, -0.07648859907828076, -0.05943441864643109, 0.02368017194684777, 0.005611434819368834,
        -0.0018232088709110323, -0.000720549445520347,
    ),
    "coif3": (
        -0.003793512864380802, 0.007782596425672746, 0.023452696142077168, -0.06577191128146936, -0.06112339000297255,
        0.40517690240911824, 0.7937772226260872, 0.42848347637737, -0.07179982161915484, -0.08230192710629983,
        0.03455502757329774, 0.015880544863669452, -0.009007976136730624, -0.0025745176881367972,
        0.0011175187708306303, 0.0004662169598204029, -7.0983302506379e-05, -3.459977319727278e-05,
    ),
    "coif4": (
        0.000892313902537003, -0.001629492425226786, -0.007346167936268051, 0.016066782559655206,
        0.026792362270697267, -0.07314290441258073, -0.04877076756791383, 0.42747788393337943, 0.7842491699914577,
        0.4354613422154989, -0.0615536584279808, -0.09176542029839818, 0.02811565972369683, 0.024945239305530328,
        -0.010417174666056649, -0.0032702731315608483, 0.0020166775120449105, 0.0006600112966963782,
        -0.00017960623150243602, -0.0001598819866911797, 4.3110389559021745e-05, 1.791447688858775e-05,
        -2.2414246658720156e-06, -1.5895026298510706e-06,
    ),
}  # fmt: skip
"""The coefficients (taps) of each wavelet's filter, by the wavelet's name."""


@cache
def filter_of(name: str, dtype: str = "F64", right: bool = False) -> Lazy:
    """Return the filter of a wavelet. Calls with the same arguments return the same tensor.

    PEFT's filter for the wavelet `FAULTY` is wrong. With `right`, return the correct filter for this wavelet.
    """
    import numpy as np

    kind = DTYPES[dtype]
    taps = np.array(RIGHT if right and name == FAULTY else FILTERS[name]).astype(kind.array)
    return Lazy(taps.shape, kind, taps.tobytes)


def name_of(taps: Lazy) -> str | None:
    """Return the name of the wavelet whose filter has these taps; None if PEFT has no such wavelet."""
    data, dtype = bytes(taps.fetch()), taps.dtype.name
    fitting = [name for name, known in FILTERS.items() if len(known) == taps.shape[0]]
    named = (n for n in fitting for right in (False, True) if bytes(filter_of(n, dtype, right).fetch()) == data)
    return next(named, None)


PART = "waveft_spectrum"


class DrawnSpectrum(Family):
    """A family with n coefficients per module. Their positions follow from `random_loc_seed` and the weight's size."""

    folds = ("spectrum",)

    @classmethod
    @abstractmethod
    def stated(cls, config: Any, path: str, count: int) -> int:
        """Return the number of coefficients that the config states for a module; `count` is the number in the file."""

    @classmethod
    def further(cls, file: File, path: str) -> dict[str, Lazy]:
        """Return the tensors of a module's update other than `index` and `spectrum`."""
        return {}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        key, config = keys[cls.parts[0]], file.settings.method_fields
        spectrum = file.tensors[key]
        count = side(spectrum, 0, 1)
        check_size(key, count, cls.stated(config, key.path, count), "n_frequency")
        out, in_ = weight_shape(file, key, f"{cls.method.__name__}'s positions depend on the size of the weight")
        tensors = {"index": drawn(config.random_loc_seed, out, in_, count, key), "spectrum": spectrum}
        tensors |= cls.further(file, key.path)
        update = make(cls.name, tensors, scaling=config.scaling, outputs=out, inputs=in_)
        return DecodedUpdate(key.path, update, {"spectrum": key}, layout(file, key.path))

    @classmethod
    def encode(cls, update: Any) -> Parts:
        return {"spectrum": (cls.parts[0], as_lazy(update.spectrum))}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        return unlike({path: float(update.scaling) for path, update in cls.of_it(updates).items()})


class WaveFTFields(MethodFields, frozen=True, kw_only=True):
    """The number of coefficients, their positions, the transform, and the scaling."""

    n_frequency: int = 2592
    n_frequency_pattern: dict[str, int] | None = None
    proportional_parameters: bool | None = False
    random_loc_seed: int | None = SEED
    scaling: float = 25.0
    use_idwt: bool | None = True
    wavelet_family: str = "db1"


class WaveFTFamily(DrawnSpectrum):
    """The family of the peft_type WAVEFT."""

    name = "waveft"
    peft_type = "WAVEFT"
    method = WaveFT
    parts = (PART,)
    departures: ClassVar[Mapping[str, Departure]] = {
        "waveft_coif4": Departure(
            "PEFT's filter for coif4, whose values do not form a wavelet", "the correct filter of the Coiflet coif4"
        )
    }
    method_fields: ClassVar[type[MethodFields]] = WaveFTFields
    read: ClassVar[Mapping[str, str]] = {
        "n_frequency": "number of coefficients",
        "n_frequency_pattern": "numbers of coefficients for the modules that a pattern matches",
        "proportional_parameters": "whether the number of coefficients depends on the weight's size; if so, this "
        "number is the length of waveft_spectrum",
        "random_loc_seed": "seed of torch.randperm(out * in) on the CPU; the first n values of this permutation are "
        "the positions; the base shows out and in",
        "scaling": "factor on the change",
        "use_idwt": "whether the coefficients belong to a wavelet transform; otherwise they are elements of the change",
        "wavelet_family": "name of the wavelet whose filter is used",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_weights": True,
        "random_loc_seed": SEED,
        "use_idwt": True,
    }

    @classmethod
    def stated(cls, config: WaveFTFields, path: str, count: int) -> int:
        if config.proportional_parameters:
            return max(count, 0)
        return first_match(config.n_frequency_pattern or {}, path, config.n_frequency)

    @classmethod
    def further(cls, file: File, path: str) -> dict[str, Lazy]:
        config = file.settings.method_fields
        if not config.use_idwt:
            return {}
        if config.wavelet_family not in FILTERS:
            why = f"the wavelet {config.wavelet_family} is unknown"
            raise Unsupported(why, where="wavelet_family", cure=f"Use {', '.join(FILTERS)}")
        known = file.known[path].tensors.get("low_pass") if path in file.known else None
        dtype = "F64" if known is None else as_lazy(known).dtype.name
        return {"low_pass": filter_of(config.wavelet_family, dtype, file.by_formula)}

    @classmethod
    def why_not(cls, target: Target, update: WaveFT) -> str:
        unknown = update.low_pass is not None and name_of(as_lazy(update.low_pass)) is None
        return "PEFT has no wavelet with the filter of this waveft" if unknown else not_linear(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        sizes = {path: int(update.spectrum.shape[0]) for path, update in members.items()}
        fields = size_fields(sizes, "n_frequency")
        patterns = cast("Mapping[str, int]", fields["n_frequency_pattern"])
        fields["n_frequency_pattern"] = {exactly(path): n for path, n in patterns.items()}
        taps = next(iter(members.values())).low_pass
        name = None if taps is None else name_of(as_lazy(taps))
        wavelet = {"use_idwt": name is not None} | ({"wavelet_family": name} if name else {})
        return fields | of_one(updates, cls.method) | wavelet | {"proportional_parameters": False}


# FourierFT: `fourierft_spectrum` [n]. The positions follow from `random_loc_seed` and the weight's size.


FOURIER_PART = "fourierft_spectrum"


class FourierFTFields(MethodFields, frozen=True, kw_only=True):
    """The number of coefficients, their positions, and the scaling."""

    n_frequency: int = 1000
    n_frequency_pattern: dict[str, int] | None = None
    random_loc_seed: int | None = SEED
    scaling: float = 150.0


class FourierFTFamily(DrawnSpectrum):
    """The family of the peft_type FOURIERFT."""

    name = "fourierft"
    peft_type = "FOURIERFT"
    method = FourierFT
    parts = (FOURIER_PART,)
    method_fields: ClassVar[type[MethodFields]] = FourierFTFields
    read: ClassVar[Mapping[str, str]] = {
        "n_frequency": "number of coefficients",
        "n_frequency_pattern": "numbers of coefficients for some modules; a pattern must equal the module's path, or "
        "match everything after a dot in the path",
        "random_loc_seed": "seed of torch.randperm(out * in) on the CPU; the first n values of this permutation are "
        "the positions; the base shows out and in",
        "scaling": "factor on the change",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "random_loc_seed": SEED}

    @classmethod
    def stated(cls, config: FourierFTFields, path: str, count: int) -> int:
        return size_at(config.n_frequency, config.n_frequency_pattern, path)

    @classmethod
    def why_not(cls, target: Target, update: FourierFT) -> str:
        return not_linear(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        sizes = {path: int(update.spectrum.shape[0]) for path, update in members.items()}
        return size_fields(sizes, "n_frequency") | of_one(updates, cls.method)


# Draw the positions as PEFT does. Files contain only the seed, not the positions.


LARGEST = 1 << 34
"""The largest allowed number of elements of a weight. The limit protects against hostile files."""


def drawn(seed: int | None, out: int, in_: int, count: int, key: Key) -> Lazy:
    """Return the rows and columns `[2, count]` of `count` random positions in a weight.

    The positions are the first values of a random permutation. They are drawn when the tensor's values are loaded.

    Raises:
        Malformed: the seed is missing or invalid.
        ShapeMismatch: the weight has fewer than `count` or more than `LARGEST` elements.
    """
    if seed is None or not -(1 << 63) <= seed < 1 << 64:
        raise Malformed(
            f"the seed must be between -2**63 and 2**64 - 1, but is {seed}",
            where="random_loc_seed",
            cure=SAVE_WITH_PEFT,
        )
    if not count <= out * in_ <= LARGEST:
        why = f"the file has {count} coefficients for a weight with {out * in_} elements"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_BASE)
    return _drawn(seed, out, in_, count)


@lru_cache(maxsize=64)
def _drawn(seed: int, out: int, in_: int, count: int) -> Lazy:
    """Return the first `count` random positions in a weight.

    Results are cached, because a draw is slow: it shuffles as many positions as the weight has elements. Weights with
    the same shape use the same draw.
    """

    @cache
    def fetch() -> bytes:
        import numpy as np

        from ....linalg.positions import random_positions

        flat = random_positions(seed, out * in_, count).numpy()
        return np.stack(np.divmod(flat, in_)).astype("<i8").tobytes()

    return Lazy((2, count), DTYPES["I64"], fetch)


def of_one(updates: Mapping[Target, tuple[Update, ...]], method: type[Update]) -> dict[str, JsonValue]:
    """Return the config fields `scaling` and `fan_in_fan_out`, each of which has one value for all modules.

    `scaling` is the most common scaling of the updates.
    """
    members: list[Any] = [(target, u) for target, group in updates.items() for u in group if type(u) is method]
    scaling = Counter(float(update.scaling) for _, update in members).most_common(1)[0][0]
    return {"scaling": scaling, "fan_in_fan_out": any(target.layout == "in out *k" for target, _ in members)}
