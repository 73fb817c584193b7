"""PVeRA: VeRA with `pvera_lambda_d` [2r] and `pvera_A` [2r, inputs]: the mean's half, then the variance's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Unsupported
from ....methods.pvera import PVeRA
from ._projections import ProjectionFields, Projections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..file import File, Findings
    from ._family import Own


class Drawing(ProjectionFields, frozen=True, kw_only=True):
    """Whether the model also draws random values outside of training."""

    sample_at_inference: bool = False


class PveraFamily(Projections):
    """The family of the peft_type PVERA."""

    peft_type = "PVERA"
    method = PVeRA
    parts = ("pvera_lambda_b", "pvera_lambda_d")
    shared = ("pvera_A", "pvera_B")
    halves = 2
    own: ClassVar[type[Own]] = Drawing
    read: ClassVar[Mapping[str, str]] = {
        **Projections.read,
        "sample_at_inference": "must be off: with it, each forward pass draws another change",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "d_initial": "initial values",
        "generator_seed": "of what training draws",
        "pvera_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "d_initial": 0.1,
        "init_weights": True,
        "projection_prng_key": 0,
        "pvera_dropout": 0.0,
    }

    @classmethod
    def decode(cls, file: File) -> Findings:
        if file.settings.own.sample_at_inference:
            why = "PVeRA that draws at random in each forward pass has no fixed formula"
            raise Unsupported(why, where="sample_at_inference", cure="Set it to false, to take the mean")
        yield from super().decode(file)
