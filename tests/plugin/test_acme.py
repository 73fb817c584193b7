"""What the package gives to adapterkit passes adapterkit's tests for such additions."""

from adapterkit.testing import CombinerTests, FormatTests, MethodTests


class TestAcme(FormatTests):
    format = "acme"


class TestTilt(MethodTests):
    method = "tilt"

    def change(self, W):
        update = self.update()
        return update.by * update.u.double().numpy()[:, None] * update.v.double().numpy()[None]


class TestHalves(CombinerTests):
    combiner = "halves"

    def combined(self, changes, weights):
        return sum(0.5 * weight * change for weight, change in zip(weights, changes, strict=True))
