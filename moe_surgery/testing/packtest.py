"""A test case for a rule pack: say what your model is and which blocks must be replaced; the rest is inherited.

    class TestMyFamily(PackTest):
        pack = "my_family.toml"
        replaced = {"layers.*.mlp": "my-family/decoder"}

        def build(self):
            torch.manual_seed(0)
            model = MyModel(MyConfig(hidden_size=64)).eval()
            return model, {"input_ids": torch.arange(12)[None]}

pytest finds the inherited ``test_`` methods. They need no pytest and raise AssertionError alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe_surgery.packs.pattern import Pattern
from moe_surgery.testing.families import outputs
from moe_surgery.testing.trial import TOLERANCE, Trial, attempt, distance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_surgery.packs.pack import Pack

Mutation = Callable[["nn.Module"], object]
"""A change of the model in place, such as ``lambda model: setattr(model.layers[0].mlp, "top_k", 1)``."""


class PackTest:
    """Two pictures of a model, before and after, and what must be the same in them.

    Subclasses give ``pack``, the file or the installed pack under test; ``replaced``, the rule that must match at
    every path that a glob covers; and ``build``. They may give ``left``, a part of the reason for every MoE-looking
    path that is not replaced; ``mutations``, changes of the model that must not be silently wrong; and ``target``.

    Every weight of the model should matter. A bias that is zero, as a model initialises it, can be lost unseen.
    """

    pack: ClassVar[str | Path | Pack]
    replaced: ClassVar[Mapping[str, str]]
    left: ClassVar[Mapping[str, str]] = {}
    mutations: ClassVar[Mapping[str, Mutation]] = {}
    target: ClassVar[str] = "auto"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """A new model in evaluation mode, the same at each call, and the keyword arguments of one call of it."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What the model computes, as one tensor; the logits of a transformers model."""
        return outputs(model, inputs)

    def test_the_named_blocks_are_replaced_and_no_other(self) -> None:
        report = self._right(self._attempt(*self.build())).report
        assert report is not None
        covered: set[tuple[str, str]] = set()
        for step in report.steps:
            where = "replaced" if step.outcome == "replaced" else "left"
            said = {glob: word for glob, word in getattr(self, where).items() if Pattern(glob).matches(step.path)}
            assert said, f"{step.path} is {step.outcome}, and no glob of {where} covers it: {step.reason}"
            covered.update((where, glob) for glob in said)
            wanted = " or ".join(said.values())
            if step.outcome == "replaced":
                assert step.rule in said.values(), f"{step.path} is replaced by the rule {step.rule}, not {wanted}"
            else:
                fits = any(word in step.reason for word in said.values())
                assert fits, f"{step.path} is {step.outcome}: {step.reason}, not: {wanted}"
        everything = {("replaced", glob) for glob in self.replaced} | {("left", glob) for glob in self.left}
        assert covered == everything, f"no site is {' nor '.join(f'{a} at {b}' for a, b in everything - covered)}"

    def test_the_outputs_are_the_same_and_undo_restores_the_model(self) -> None:
        report = self._right(self._attempt(*self.build())).report
        assert report is not None and report.replaced, "nothing is replaced, so nothing was tested"

    def test_no_mutation_is_silently_wrong(self) -> None:
        """The mutated model must come out computing the same, whether its blocks are replaced, left, or ended an error.

        A mutation that changes nothing would show nothing, so it fails the test.
        """
        model, inputs = self.build()
        plain = self.outputs(model, inputs)
        for name, mutate in self.mutations.items():
            model, inputs = self.build()
            mutate(model)
            changed = distance(self.outputs(model, inputs), plain)
            assert changed > TOLERANCE, f"the mutation {name!r} changes the outputs by {changed:.1e} only"
            trial = self._attempt(model, inputs)
            assert trial.loud, f"under the mutation {name!r}: {trial.wrong}"

    def _attempt(self, model: nn.Module, inputs: Mapping[str, Any]) -> Trial:
        return attempt(model, inputs, outputs=self.outputs, packs=[self.pack], target=self.target)

    def _right(self, trial: Trial) -> Trial:
        assert trial.right, trial.wrong
        return trial
