"""Engines that build one part of their checkpoint's model, as vllm-omni's stages do: what is expected of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, Qwen2MoeConfig, Qwen3OmniMoeForConditionalGeneration
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

from moe_surgery.engine import receipts
from moe_surgery.engine.model.counts import check_counts
from moe_surgery.engine.model.elsewhere import tell
from moe_surgery.engine.model.load import name_of
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import ExpectationError
from moe_surgery.models.tree import find_sites
from moe_surgery.packs.match import Match
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.deciding import match_rules
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.survey import survey
from moe_surgery.report.outcomes import Step
from moe_surgery.report.receipt import Receipt

PACKS = load_packs(("qwen3-omni",))
LAYERS = ("0", "1")


@pytest.fixture(scope="module")
def config(omni_dir: Path) -> object:
    return AutoConfig.from_pretrained(omni_dir)


@pytest.fixture(scope="module")
def whole(config: object) -> nn.Module:
    with torch.device("meta"):
        return Qwen3OmniMoeForConditionalGeneration(config).eval()


def stage(**parts: nn.Module) -> nn.Module:
    """A model of these parts, each under the names that vLLM's models have: the decoder is ``language_model.model``."""
    return nn.ModuleDict(
        {name: nn.ModuleDict({"language_model": nn.ModuleDict({"model": part})}) for name, part in parts.items()}
    )


def count(model: nn.Module, config: object, fused: tuple[str, ...] = (), outcome: str = "kept") -> list[str]:
    """The rules that matched, after their counts were checked; sites at ``fused`` are matched with none."""
    matches = {item.site.path: match_rules(item, PACKS, config) for item in survey(model)}
    matches |= dict.fromkeys(fused)
    steps = tuple(Step(path, "Block", outcome, "") for path in matches)  # type: ignore[arg-type]
    check_counts(Plan("vllm:Omni.stage", "auto", steps), model, matches.values(), fused, PACKS, config)
    return [match.rule for match in matches.values() if isinstance(match, Match)]


def test_each_stage_is_matched_by_its_own_rule(
    whole: nn.Module, config: object, caplog: pytest.LogCaptureFixture
) -> None:
    for part, other in (("thinker", "talker"), ("talker", "thinker")):
        caplog.clear()
        assert count(stage(**{part: whole.get_submodule(part).model}), config) == [f"qwen3-omni/{part}"] * 2
        assert caplog.messages == [
            f"qwen3-omni/{other}: no module of Omni.stage is where it looks, so nothing is expected of it"
        ]


def test_a_stage_without_blocks_may_be_built(config: object) -> None:
    assert count(stage(code2wav=nn.Linear(2, 2)), config) == []


def test_blocks_that_vllm_has_fused_are_counted_where_the_rule_looks(whole: nn.Module, config: object) -> None:
    model = stage(talker=whole.talker.model)
    layers = model.get_submodule("talker.language_model.model.layers")
    for name in LAYERS:
        layers.get_submodule(name).mlp = nn.Linear(2, 2)
    paths = tuple(f"talker.language_model.model.layers.{name}.mlp" for name in LAYERS)
    assert count(model, config, paths) == []
    for fewer in (paths[:1], ("talker.a", "talker.b")):
        with pytest.raises(ExpectationError, match="talker expects 2 sites and matches 0"):
            count(model, config, fewer)


def test_a_site_that_is_left_over_may_be_the_missing_one(whole: nn.Module, config: object) -> None:
    with pytest.raises(ExpectationError, match="talker expects 2 sites and matches 0"):
        count(stage(thinker=whole.thinker.model), config, outcome="missed")


def test_every_stage_has_receipts_of_its_own(tmp_path: Path) -> None:
    """Although all are of one class: as many ranks as they have, and none speaks for another that has ended."""
    model, ended = nn.Linear(2, 2), 2**22 + 1
    assert name_of(model, SimpleNamespace()) == "Linear"
    names = [name_of(model, SimpleNamespace(model_stage=each)) for each in ("thinker", "talker")]
    assert names == ["Linear.thinker", "Linear.talker"]
    of_two = [Receipt(ended + rank, rank, 2, names[0], "kept", "f", None, None) for rank in range(2)]
    told = [*of_two, Receipt(ended + 2, 0, 1, names[1], "operated", "g", None, None)]
    for receipt in told:
        receipts.write(tmp_path, receipt)
    assert sorted(receipts.read_all(tmp_path), key=lambda each: each.pid) == told
    receipts.check(receipts.read_all(tmp_path))


def test_what_another_loader_built_is_told_of(
    whole: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked, done in ((Orders(str(tmp_path)), "operated on"), (Orders(str(tmp_path), audit=True), "audited")):
        tell(nn.ModuleDict({"transformer": whole.thinker.model}), asked)
        [receipt] = receipts.read_all(tmp_path)
        assert (receipt.outcome, receipt.rank, receipt.world, receipt.exit_code) == ("unpatched", 0, 1, 0)
        assert receipt.error is not None and f"and 1 more can't be {done}: vllm-omni's own loader" in receipt.error
        assert receipt.error.startswith("transformer.layers.0.mlp (Qwen3OmniMoeThinkerTextSparseMoeBlock)")
        assert capsys.readouterr().err == f"moe-surgery: WARNING: ModuleDict: {receipt.error}\n"


class OneOfTwo(nn.Module):
    """An MLP for text and one for images, as Bagel's layers have: an argument says which."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.mlp, self.image_mlp = one, other

    def forward(self, x: torch.Tensor, mode: str = "text") -> torch.Tensor:
        return self.mlp(x) if mode == "text" else self.image_mlp(x)


def test_a_model_without_routers_is_no_concern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(nn.ModuleDict({"vae": nn.Linear(2, 2)}), Orders(str(tmp_path)))
    mlps = (Qwen2MoeMLP(Qwen2MoeConfig(hidden_size=8), 16) for _ in range(2))
    model = nn.ModuleDict({"layer": OneOfTwo(*mlps)})
    assert [site.told is not None for site in find_sites(model)] == [True]
    tell(model, Orders(str(tmp_path)))
    assert receipts.read_all(tmp_path) == () and capsys.readouterr().err == ""
