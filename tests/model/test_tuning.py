"""What learns, how fast, and from what: every claim on plain and hierarchical backbones, with what must fail beside it."""

import copy
import functools
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.optim.swa_utils import AveragedModel

import canopy.model.network
from canopy.errors import ContractError, RecipeError
from canopy.model.distribution import Bins
from canopy.model.network import HeightNetwork, NetworkConfig
from canopy.model.package import Contract, Training, load_model, save_model
from canopy.model.train import train
from canopy.model.tuning import (
    LowRank,
    Start,
    Tuning,
    adapt,
    keep_frozen,
    merge,
    parameter_groups,
    pretrained,
    start_from,
    summary,
)
from tests.model.test_train import recipe, tile_sets  # noqa: F401 - a fixture

SMALL = {"decoder_channels": 8, "head_channels": 8, "bins": Bins(count=8)}
PLAIN = {"depth": 6, "embed_dim": 24, "num_heads": 2}
VIT = NetworkConfig(
    backbone="vit_tiny_patch16_224", backbone_options={**PLAIN, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}, **SMALL
)
# At the published start of 1e-5 LayerScale hides the blocks.
DINOV3 = NetworkConfig(
    backbone="vit_small_patch16_dinov3_qkvb", backbone_options={**PLAIN, "embed_dim": 32, "init_values": 0.3}, **SMALL
)
MIXED = NetworkConfig(backbone="vit_small_patch16_rope_mixed_224", backbone_options={**PLAIN, "embed_dim": 32}, **SMALL)
PVT = NetworkConfig(
    backbone="pvt_v2_b0",
    backbone_options={
        "depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "drop_path_rate": 0.2,
    },
    **SMALL,
)  # fmt: skip
SWIN = NetworkConfig(
    backbone="swin_tiny_patch4_window7_224",
    backbone_options={"depths": (1, 1, 2, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
    **SMALL,
)
CONVNEXT = NetworkConfig(
    backbone="convnext_atto", backbone_options={"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1)}, **SMALL
)
RESNET = NetworkConfig(backbone="resnet18", backbone_options={"channels": (8, 8, 16, 16)}, **SMALL)
"""Batch norm."""
ALL = {"vit": VIT, "dinov3": DINOV3, "mixed": MIXED, "pvt": PVT, "swin": SWIN, "convnext": CONVNEXT, "resnet": RESNET}
DEPTH = {"vit": 6, "dinov3": 6, "mixed": 6, "pvt": 4, "swin": 5, "convnext": 5, "resnet": 8}
each = pytest.mark.parametrize("name", ALL)

TUNINGS = {
    "full": Tuning(),
    "frozen": Tuning(backbone="frozen"),
    "last": Tuning(backbone="last", last_blocks=2),
    "lora": Tuning(backbone="lora", lora_rank=4),
}
each_tuning = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)


def build(config: NetworkConfig, seed: int = 0) -> HeightNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeightNetwork(config)


def adapted(config: NetworkConfig, tuning: Tuning, **options) -> HeightNetwork:
    network = build(config)
    adapt(network, tuning, generator(), **options)
    return network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn((2, channels, 32, 64), generator=generator(seed))


def heights(network: HeightNetwork, x: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode."""
    modes = [(module, module.training) for module in network.modules()]
    with torch.no_grad():
        logits = network.eval()(x)
    for module, training in modes:
        module.training = training
    return logits


def step(network: HeightNetwork, tuning: Tuning, x: torch.Tensor, *, steps: int = 1, lr: float = 1e-2) -> None:
    """Steps as training takes them."""
    optimiser = torch.optim.AdamW(parameter_groups(network, tuning, lr=lr, weight_decay=0.01))
    network.train()
    keep_frozen(network, tuning)
    for number in range(steps):
        torch.manual_seed(number)
        optimiser.zero_grad()
        network(x).square().mean().backward()
        optimiser.step()


def learning(network: HeightNetwork) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if torch.equal(a[name], b[name])}


# --- what learns


@each
@each_tuning
def test_adapting_changes_no_output_and_what_learns_gets_a_gradient_and_no_other_moves(name, tuning):
    """DDP refuses a network with parameters that no output depends on."""
    network = build(ALL[name])
    plain = heights(network, image())
    adapt(network, tuning, generator())
    assert torch.equal(heights(network, image()), plain)
    before = copy.deepcopy(network.state_dict())
    step(network, tuning, image(), steps=2)  # LoRA's A learns once B is no longer 0
    learned = learning(network)
    for parameter_name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (parameter_name in learned), parameter_name
    still = bit_equal(before, network.state_dict())
    parameters = {parameter_name for parameter_name, _ in network.named_parameters()}
    # A key's bias moves no softmax; whatever else learns has moved.
    unmoved = {
        parameter_name for parameter_name in learned & still if not parameter_name.endswith(("k_bias", "num_batches"))
    }
    assert not unmoved
    assert parameters - learned <= still
    assert len(learned) < len(parameters) or tuning.backbone == "full"


@each
def test_the_last_blocks_are_those_nearest_to_the_output(name):
    previous: set[str] = set()
    for last in sorted({1, 2, DEPTH[name]}):
        tuning = Tuning(backbone="last", last_blocks=last)
        now = {n for n in learning(adapted(ALL[name], tuning)) if n.startswith("backbone.")}
        assert previous < now
        previous = now
    stem = {n for n in learning(build(ALL[name])) if n.startswith("backbone.")} - previous
    assert stem, "the stem stays frozen"
    assert not any("blocks" in n for n in stem)
    with pytest.raises(RecipeError, match=rf"last_blocks is {DEPTH[name] + 1}, .* has {DEPTH[name]} blocks.*from 1 to"):
        adapted(ALL[name], Tuning(backbone="last", last_blocks=DEPTH[name] + 1))


def test_last_learns_whole_blocks_and_the_norm_after_them():
    names = learning(adapted(VIT, TUNINGS["last"]))
    blocks = {n.split(".")[3] for n in names if ".blocks." in n}
    assert blocks == {"4", "5"}
    assert {"backbone.body.norm.weight", "backbone.body.norm.bias"} <= names
    assert not names & {"backbone.body.cls_token", "backbone.body.pos_embed", "backbone.body.patch_embed.proj.weight"}


@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_frozen_layers_keep_no_graph(name):
    network = adapted(ALL[name], TUNINGS["frozen"])
    maps, _ = network.backbone(image())
    assert not any(map_bchw.requires_grad for map_bchw in maps)
    maps, _ = adapted(ALL[name], TUNINGS["full"]).backbone(image())
    assert all(map_bchw.requires_grad for map_bchw in maps)


@pytest.mark.parametrize("name", ["vit", "dinov3", "mixed"])
def test_blocks_before_the_last_ones_keep_no_graph(name):
    network, outputs = adapted(ALL[name], TUNINGS["last"]), []
    for block in network.backbone.body.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.requires_grad))
    network(image())
    assert outputs == [False] * 4 + [True] * 2


def test_frozen_batch_statistics_stand_still_and_frozen_dropout_is_off():
    network = adapted(RESNET, TUNINGS["frozen"])
    before = copy.deepcopy(network.backbone.state_dict())
    step(network, TUNINGS["frozen"], image(), steps=2)
    assert bit_equal(before, network.backbone.state_dict()) == set(before)
    network.train()  # the control: without `keep_frozen` the statistics move
    network(image())
    assert bit_equal(before, network.backbone.state_dict()) < set(before)

    network = adapted(VIT, TUNINGS["frozen"])
    network.train()
    random = [network.backbone(image())[0][-1] for _ in range(2)]
    assert not torch.equal(*random)
    keep_frozen(network, TUNINGS["frozen"])
    still = [network.backbone(image())[0][-1] for _ in range(2)]
    assert torch.equal(*still)
    assert network.head.training


def test_with_lora_batch_statistics_stand_still_and_dropout_works():
    network = adapted(RESNET, Tuning(backbone="lora", lora_rank=4))
    before = copy.deepcopy(dict(network.backbone.named_buffers()))
    step(network, TUNINGS["lora"], image())
    assert bit_equal(before, dict(network.backbone.named_buffers())) == set(before)
    network = adapted(VIT, TUNINGS["lora"])
    network.train()
    keep_frozen(network, TUNINGS["lora"])
    assert not torch.equal(*[network.backbone(image())[0][-1] for _ in range(2)])


def test_frozen_batch_norms_keep_their_statistics_while_all_else_learns():
    def moved(tuning):
        network = adapted(RESNET, tuning)
        before = copy.deepcopy(network.state_dict())
        step(network, tuning, image(), steps=2)
        return before.keys() - bit_equal(before, network.state_dict())

    frozen, learned = moved(Tuning(frozen_batch_norm=True)), moved(Tuning())
    statistics = {name for name in learned if "running_" in name}
    assert statistics  # the control
    assert frozen == {name for name in learned if "running_" not in name and "num_batches" not in name}
    assert any("bn" in name for name in frozen), "scales and offsets learn"


def test_batch_norms_to_freeze_that_are_not_there_are_refused():
    with pytest.raises(RecipeError, match="'pvt_v2_b0' has none"):
        adapted(PVT, Tuning(frozen_batch_norm=True))


def test_summary_counts():
    network = adapted(VIT, TUNINGS["frozen"])
    rest = sum(p.numel() for n, p in network.named_parameters() if not n.startswith("backbone."))
    assert summary(network).startswith(f"{rest:,} of ")


# --- LoRA


@pytest.mark.parametrize("name", ["vit", "dinov3", "pvt", "swin", "convnext"])
def test_merging_gives_a_plain_network_of_the_same_heights(name):
    tuning = TUNINGS["lora"]
    network = adapted(ALL[name], tuning)
    untouched = heights(network, image())
    step(network, tuning, image(), steps=3)
    before = heights(network, image())
    assert (before - untouched).abs().max() > 1e-3
    merge(network)
    assert (heights(network, image()) - before).abs().max() <= 1e-5
    plain = build(ALL[name], seed=9)
    assert network.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(heights(plain, image()), heights(network, image()))
    assert not any(isinstance(module, LowRank) for module in network.modules())
    assert {type(module) for module in network.modules()} == {type(module) for module in plain.modules()}
    assert learning(network) == learning(plain)


def test_merging_adds_alpha_over_rank_times_b_a():
    """Equation 3 of Hu et al. 2021, by hand."""
    network = adapted(DINOV3, Tuning(backbone="lora", lora_rank=4, lora_alpha=12.0))
    qkv = network.backbone.body.blocks[2].attn.qkv
    low_rank, original = qkv.parametrizations.weight[0], qkv.parametrizations.weight.original.detach().clone()
    nn.init.normal_(low_rank.b, generator=generator(5))
    expected = original.double() + 12.0 / 4 * low_rank.b.detach().double() @ low_rank.a.detach().double()
    merge(network)
    torch.testing.assert_close(qkv.weight.detach().double(), expected, atol=1e-6, rtol=0)
    assert (expected - original).abs().max() > 0.1


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_lora_survives_deep_copies_and_state_dicts(name):
    tuning = TUNINGS["lora"]
    network = adapted(ALL[name], tuning)
    average = AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    step(network, tuning, image(), steps=2)
    average.update_parameters(network)  # the first one copies
    assert torch.equal(heights(average.module, image()), heights(network, image()))
    at_first = copy.deepcopy(network.state_dict())
    step(network, tuning, image(2 + 1, seed=4), steps=2)
    average.update_parameters(network)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.5 * at_first[key] + 0.5 * network.state_dict()[key], atol=1e-6, rtol=1e-5)
    merge(average.module)  # of a copy: the other one stays adapted and trains on
    step(network, tuning, image())
    assert any(isinstance(module, LowRank) for module in network.modules())

    again = adapted(ALL[name], tuning)
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(heights(again, image()), heights(network, image()))
    with pytest.raises(RuntimeError, match="parametrizations"):  # the control: a plain network does not take it
        build(ALL[name]).load_state_dict(network.state_dict(), strict=True)


def test_a_starts_from_the_generator_and_b_at_zero():
    a, b, other = build(VIT), build(VIT), build(VIT)
    adapt(a, TUNINGS["lora"], generator(3))
    torch.manual_seed(123)  # torch's own generator has no part in it
    adapt(b, TUNINGS["lora"], generator(3))
    adapt(other, TUNINGS["lora"], generator(4))
    assert bit_equal(a.state_dict(), b.state_dict()) == a.state_dict().keys()
    parts = [name for name in a.state_dict() if name.endswith(".weight.0.a")]
    assert len(parts) == 4 * 6
    assert not bit_equal({n: a.state_dict()[n] for n in parts}, other.state_dict())
    assert all(not value.any() for name, value in a.state_dict().items() if name.endswith(".weight.0.b"))


def test_lora_layers_are_chosen_by_name():
    def layers(*names: str) -> set[str]:
        tuning = Tuning(backbone="lora", lora_rank=2, lora_layers=names or None)
        network = adapted(VIT, tuning)
        return {n.split(".", 2)[2] for n, module in network.named_modules() if hasattr(module, "parametrizations")}

    assert layers("qkv") == {f"blocks.{block}.attn.qkv" for block in range(6)}
    assert layers("attn.proj") == layers("proj") == {f"blocks.{block}.attn.proj" for block in range(6)}
    assert layers("blocks.5.attn.qkv", "fc2") == {"blocks.5.attn.qkv", *(f"blocks.{block}.mlp.fc2" for block in range(6))}
    assert layers() == layers("qkv", "proj", "fc1", "fc2")
    for wrong in ("kv", "key", "patch_embed.proj", "norm1"):
        with pytest.raises(RecipeError, match=rf"lora_layers '{wrong}' is no linear.*choose from fc1, fc2, proj, qkv$"):
            layers("qkv", wrong)
    with pytest.raises(
        RecipeError, match=r"lora_rank 24 saves nothing on blocks\.0\.attn\.qkv of \(72, 24\); choose less than 24"
    ):
        adapted(VIT, Tuning(backbone="lora", lora_rank=24))


def test_under_bfloat16_lora_and_its_merged_weights_agree_bit_for_bit():
    network = adapted(VIT, TUNINGS["lora"])
    step(network, TUNINGS["lora"], image(), steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = heights(network, image())
        merge(network)
        assert torch.equal(heights(network, image()), before)


# --- how fast


@pytest.mark.parametrize("name", ["vit", "dinov3", "mixed"])
def test_layer_wise_rates_of_a_plain_vit(name):
    tuning = Tuning(layer_decay=0.5, backbone_lr_factor=0.1)
    network = adapted(ALL[name], tuning)
    rates = rate_of(network, tuning)
    table = {
        "patch_embed.proj.weight": 0.5**6, "cls_token": 0.5**6, "blocks.0.attn.qkv.weight": 0.5**5,
        "blocks.2.mlp.fc1.bias": 0.5**3, "blocks.5.norm2.weight": 1.0, "norm.weight": 1.0,
        **({"rope.freqs": 0.5**6} if name == "mixed" else {}), **({"pos_embed": 0.5**6} if name == "vit" else {}),
    }  # fmt: skip
    for parameter, factor in table.items():
        assert rates[f"backbone.body.{parameter}"] == pytest.approx(1e-3 * 0.1 * factor), parameter
    assert {rates[parameter] for parameter in rates if not parameter.startswith("backbone.")} == {1e-3}


def rate_of(network: HeightNetwork, tuning: Tuning) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, tuning, lr=1e-3, weight_decay=0.05)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


@given(
    name=st.sampled_from(list(ALL)),
    decay=st.floats(0.1, 1.0),
    factor=st.floats(0.01, 10.0),
    kind=st.sampled_from(list(TUNINGS)),
)
def test_groups_hold_what_learns_once_and_rates_rise_with_depth(name, decay, factor, kind):
    options = {} if kind == "frozen" else {"layer_decay": decay, "backbone_lr_factor": factor}
    tuning = Tuning(**(TUNINGS[kind].model_dump() | options))
    network = shared(name, kind)
    groups = parameter_groups(network, tuning, lr=1e-3, weight_decay=0.05)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    backbone = [group["lr"] for group in groups if group["name"].startswith("backbone")]
    assert all(a <= b for a, b in pairwise(backbone))
    if backbone and kind != "lora":  # the last block of a ResNet has no linear layer
        assert backbone[-1] == pytest.approx(1e-3 * factor)
        if decay < 1 and kind == "full":
            assert backbone[0] == pytest.approx(1e-3 * factor * decay ** DEPTH[name])
    assert groups[-1]["name"].startswith("rest")
    assert groups[-1]["lr"] == 1e-3


@functools.cache
def shared(name: str, kind: str) -> HeightNetwork:
    """A network for tests that do not change it."""
    return adapted(ALL[name], TUNINGS[kind])


@each
def test_biases_norms_positions_and_tokens_are_not_decayed(name):
    network = shared(name, "full")
    groups = parameter_groups(network, Tuning(), lr=1e-3, weight_decay=0.05)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("backbone", 0.05), ("backbone, not decayed", 0.0), ("rest", 0.05), ("rest, not decayed", 0.0),
    ]  # fmt: skip
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for parameter_name, parameter in network.named_parameters():
        words = ("pos_embed", "_token", "position_bias", "rope.freqs")
        free = parameter.ndim < 2 or any(word in parameter_name for word in words)
        assert (id(parameter) in decayed) != free, parameter_name


def test_a_backbone_that_names_no_blocks_is_refused_only_where_blocks_matter(monkeypatch):
    monkeypatch.delattr(type(build(PVT).backbone.body), "group_matcher")
    adapted(PVT, Tuning())
    adapted(PVT, Tuning(backbone="frozen"))
    for tuning in (Tuning(backbone="last"), Tuning(backbone="lora")):
        with pytest.raises(RecipeError, match="'pvt_v2_b0' does not say what its blocks are"):
            adapted(PVT, tuning)
    with pytest.raises(RecipeError, match="'pvt_v2_b0' does not say what its blocks are"):
        parameter_groups(build(PVT), Tuning(layer_decay=0.9), lr=1e-3, weight_decay=0.0)


# --- the table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"last_blocks": 2}, "last_blocks is for backbone = \"last\", and backbone is 'full'; remove it"),
        ({"lora_rank": 4, "backbone": "last"}, 'lora_rank is for backbone = "lora"'),
        ({"backbone": "frozen", "layer_decay": 0.9}, "layer_decay is for a backbone that learns"),
        ({"backbone": "frozen", "checkpointing": True}, "checkpointing is for a backbone that learns"),
        ({"backbone": "lora", "lora_layers": ()}, "lora_layers names no layer"),
        ({"layer_decay": 0.0}, "greater than 0"),
        ({"layer_decay": 1.1}, "less than or equal to 1"),
        ({"lora_rank": 0, "backbone": "lora"}, "greater than 0"),
        ({"rank": 4}, "Extra inputs"),
    ],
)
def test_what_would_have_no_effect_is_refused(table, message):
    with pytest.raises(ValidationError, match=message):
        Tuning(**table)


def test_the_table_survives_being_written_with_all_its_defaults():
    for tuning in (*TUNINGS.values(), Tuning(backbone="frozen", patch_embedding=True, checkpointing=True)):
        assert Tuning(**tuning.model_dump(exclude_none=True)) == tuning


# --- where a run starts

BANDS = {"rgb": ("red", "green", "blue"), "rgbn": ("red", "green", "blue", "nir"), "nbgr": ("nir", "blue", "green", "red")}


def with_bands(config: NetworkConfig, bands: tuple[str, ...], **changes) -> NetworkConfig:
    return config.model_copy(update={"in_channels": len(bands), **changes})


@pytest.mark.parametrize("name", ["vit", "dinov3", "pvt", "convnext"])
@pytest.mark.parametrize("bands", [BANDS["rgbn"], BANDS["nbgr"]], ids=["nir last", "nir first, blue green red"])
def test_new_bands_change_nothing_at_the_start_and_something_after_a_step(name, bands):
    source = build(ALL[name], seed=5)
    network = build(with_bands(ALL[name], bands))
    start = start_from(network, source.state_dict(), config=source.config, bands=bands, start_bands=BANDS["rgb"])
    assert start == Start(new_bands=("nir",))
    rgb, expected = image(), heights(source, image())
    outputs = []
    for nir in (torch.zeros(2, 32, 64), 100 * image(1, seed=7)[:, 0]):
        planes = dict(zip(BANDS["rgb"], rgb.unbind(1), strict=True)) | {"nir": nir}
        x = torch.stack([planes[band] for band in bands], dim=1)
        outputs.append(heights(network, x))
        torch.testing.assert_close(outputs[-1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(*outputs)
    if bands != BANDS["rgbn"]:  # the control: bands by position, as without names
        wrong = torch.cat([rgb, rgb[:, :1]], dim=1)
        assert (heights(network, wrong) - expected).abs().max() > 1e-3
    adapt(network, Tuning(), generator(), new_bands=start.new_bands)
    step(network, Tuning(), x)
    assert not torch.equal(
        heights(network, x), heights(network, x * (torch.tensor([b != "nir" for b in bands])[:, None, None]))
    )


@given(data=st.data())
def test_bands_in_any_order_and_number(data):
    known = data.draw(st.permutations(["red", "green", "blue", "nir"]))[: data.draw(st.integers(1, 4))]
    bands = data.draw(st.permutations(["red", "green", "blue", "nir", "swir"]))[: data.draw(st.integers(1, 5))]
    source, network = vit_of(len(known), "source"), vit_of(len(bands), "network")
    name = "backbone.body.patch_embed.proj.weight"
    options = {"config": source.config, "bands": bands, "start_bands": known}
    if not set(known) & set(bands):
        with pytest.raises(ContractError, match="none in common"):
            start_from(network, source.state_dict(), **options)
        return
    start = start_from(network, source.state_dict(), **options)
    assert set(start.new_bands) == set(bands) - set(known)
    assert set(start.dropped_bands) == set(known) - set(bands)
    for place, band in enumerate(bands):
        slice_ohw = network.state_dict()[name][:, place]
        expected = source.state_dict()[name][:, known.index(band)] if band in known else torch.zeros_like(slice_ohw)
        assert torch.equal(slice_ohw, expected)


@functools.cache
def vit_of(count: int, role: str) -> HeightNetwork:
    return build(with_bands(VIT, ("band",) * count), seed=len(role))


def test_other_bins_restart_the_last_layer_alone_and_say_so():
    source = build(VIT, seed=5)
    for changes in ({"bins": Bins(count=16)}, {"bins": Bins(count=8, max_m=30.0)}, {"normalisation": "linear"}):
        network = build(with_bands(VIT, BANDS["rgb"], **changes), seed=6)
        own = copy.deepcopy(network.state_dict())
        start = start_from(network, source.state_dict(), config=source.config, bands=BANDS["rgb"], start_bands=BANDS["rgb"])
        assert start == Start(last_layer_restarted=True)
        assert any("last layer starts at random" in note for note in start.notes())
        last = {"head.conv3.weight", "head.conv3.bias"}
        assert last <= bit_equal(own, network.state_dict())
        rest = network.state_dict().keys() - last
        assert bit_equal({n: network.state_dict()[n] for n in rest}, source.state_dict()) == rest
    network = build(VIT, seed=6)  # the control: the same bins
    start = start_from(network, source.state_dict(), config=source.config, bands=BANDS["rgb"], start_bands=BANDS["rgb"])
    assert start == Start()
    assert not list(start.notes())
    assert torch.equal(heights(network, image()), heights(source, image()))


def test_other_networks_are_refused_by_name():
    def attempt(config: NetworkConfig, state=None, start=VIT, bands=BANDS["rgb"], start_bands=BANDS["rgb"]) -> Start:
        source = build(start)
        return start_from(
            build(config),
            source.state_dict() if state is None else state,
            config=start,
            bands=bands,
            start_bands=start_bands,
        )

    for changes, message in (
        ({"decoder_channels": 16}, "has decoder_channels = 8, the recipe's has 16; copy its"),
        ({"align_corners": True}, "align_corners = False, the recipe's has True"),
        ({"taps": (0, 1, 2, 5)}, r"taps = None, the recipe's has \(0, 1, 2, 5\)"),
        # The same tensors, another function.
        (
            {"backbone_options": {**VIT.backbone_options, "num_heads": 3}},
            "backbone_options.num_heads = 2, the recipe's has 3",
        ),
        ({"backbone": "vit_small_patch16_224"}, "backbone = vit_tiny_patch16_224, the recipe's has vit_small"),
    ):
        with pytest.raises(ContractError, match=message):
            attempt(VIT.model_copy(update=changes))
    assert attempt(VIT.model_copy(update={"backbone_options": PLAIN})) == Start(), "drop rates are no weights"
    assert attempt(VIT, start=VIT.model_copy(update={"taps": (0, 2, 3, 5)})) == Start(), "the taps that None stands for"

    state = dict(build(VIT).state_dict())
    for change, message in (
        ({k: v for k, v in state.items() if k != "head.conv1.bias"}, "lack tensor head.conv1.bias: "),
        ({f"module.{k}": v for k, v in state.items()}, "lack tensor .* and .* more"),
        (state | {"more": torch.zeros(1)}, "have the unknown tensor more: "),
        (state | {"head.conv1.bias": torch.zeros(3)}, r"head.conv1.bias .* has shape \(3,\), not \(4,\)"),
        (adapted(VIT, TUNINGS["lora"]).state_dict(), "merge LoRA first"),
    ):
        with pytest.raises(ContractError, match=message):
            attempt(VIT, state=change)
    with pytest.raises(RecipeError, match="bands red, red, blue are not 3 different ones"):
        attempt(VIT, bands=("red", "red", "blue"))
    with pytest.raises(RecipeError, match="bands red, green are not 3 different ones"):
        attempt(VIT, start_bands=("red", "green"))
    with pytest.raises(ContractError, match="bands a, b, c have none in common with the red, green, blue"):
        attempt(VIT, bands=("a", "b", "c"))


@pytest.mark.parametrize("kind", ["frozen", "last", "lora"])
def test_a_new_band_that_could_never_learn_is_refused_and_otherwise_learns(kind):
    with pytest.raises(
        RecipeError, match=f"bands nir start at 0 and backbone = '{kind}' would keep them there; set patch_emb"
    ):
        adapted(with_bands(VIT, BANDS["rgbn"]), TUNINGS[kind], new_bands=("nir",))
    for config, first in ((VIT, "patch_embed.proj"), (CONVNEXT, "stem.0")):
        tuning = Tuning(**(TUNINGS[kind].model_dump() | {"patch_embedding": True}))
        source, network = build(config), build(with_bands(config, BANDS["rgbn"]))
        start = start_from(network, source.state_dict(), config=source.config, bands=BANDS["rgbn"], start_bands=BANDS["rgb"])
        adapt(network, tuning, generator(), new_bands=start.new_bands)
        without = learning(adapted(with_bands(config, BANDS["rgbn"]), TUNINGS[kind]))
        assert learning(network) - without == {f"backbone.body.{first}.weight", f"backbone.body.{first}.bias"}
        step(network, tuning, image(4))
        assert network.state_dict()[f"backbone.body.{first}.weight"][:, 3].abs().max() > 0


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Gives timm a file of weights for each backbone, in place of a download."""
    create = canopy.model.network.timm.create_model

    def with_file(name, *, pretrained=False, **options):
        if not pretrained:
            return create(name, **options)
        file = tmp_path / f"{name}.pt"
        if not file.is_file():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(77)
                torch.save(create(name, **{**options, "in_chans": 3}).state_dict(), file)
        return create(name, pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 0}, **options)

    monkeypatch.setattr(canopy.model.network.timm, "create_model", with_file)


@pytest.mark.parametrize("name", ["vit", "pvt", "convnext"])
def test_published_weights_are_taken_by_band_name(name, published):
    config = ALL[name]
    rgb, start = pretrained(config, bands=BANDS["rgb"])
    assert start == Start()
    first = next(n for n, p in rgb.named_parameters() if p.ndim == 4)
    for bands in BANDS["rgbn"], BANDS["nbgr"]:
        network, start = pretrained(with_bands(config, bands), bands=bands)
        assert start == Start(new_bands=("nir",))
        weights = dict(zip(bands, network.state_dict()[first].unbind(1), strict=True))
        assert torch.equal(torch.stack([weights[band] for band in BANDS["rgb"]], dim=1), rgb.state_dict()[first])
        assert not weights["nir"].any()
        others = {n: p for n, p in network.state_dict().items() if n.startswith("backbone.") and n != first}
        assert bit_equal(others, rgb.state_dict()) == others.keys()
    # The control: timm itself gives the fourth band red's weights and scales all.
    of_timm = HeightNetwork(with_bands(config, BANDS["rgbn"]), pretrained=True).state_dict()[first]
    torch.testing.assert_close(of_timm[:, 3], 0.75 * rgb.state_dict()[first][:, 0])
    with pytest.raises(ContractError, match="bands nir, swir, pan have none in common"):
        pretrained(config, bands=("nir", "swir", "pan"))


# --- checkpointing


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "full") for name in ALL), *((name, kind) for name in ("vit", "dinov3", "swin") for kind in ("last", "lora"))],
)
def test_checkpointing_gives_the_same_gradients_to_the_bit(name, kind):
    """With dropout and drop path at work in the first and the fourth."""
    plain = TUNINGS[kind]
    again = Tuning(**(plain.model_dump() | {"checkpointing": True}))
    gradients, kept = [], []
    for tuning in (plain, again):
        network = adapted(ALL[name], tuning)
        for parameter in network.parameters():  # LoRA's B too: at 0 it would hide A
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.1, generator=generator(8))
        network.train()
        keep_frozen(network, tuning)
        torch.manual_seed(3)
        with KeptBytes(network) as graph:
            logits = network(image())
        kept.append(graph.count())
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert bit_equal(*gradients) == gradients[0].keys()
    assert kept[1] < kept[0]


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that the graph holds when the block ends, each storage once, weights apart."""

    def __init__(self, network: HeightNetwork) -> None:
        self.weights = {parameter.data_ptr() for parameter in network.parameters()}
        self.kept: list[weakref.ref[Holder]] = []

        def keep(tensor):
            holder = Holder([tensor])
            self.kept.append(weakref.ref(holder))
            return holder

        super().__init__(keep, lambda holder: holder[0])

    def __enter__(self):
        super().__enter__()
        return self

    def count(self) -> int:
        storages = [holder[0].untyped_storage() for ref in self.kept if (holder := ref()) is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self.weights}.values())


class Holder(list):
    """A list that can be referred to weakly."""


def test_merging_switches_checkpointing_off():
    network = adapted(VIT, Tuning(checkpointing=True))
    assert network.backbone.body.grad_checkpointing
    merge(network)
    assert not network.backbone.body.grad_checkpointing


@pytest.mark.parametrize(
    "switch", [lambda *_: None, None], ids=["takes the switch and ignores it", "does not know checkpointing"]
)
def test_checkpointing_that_would_save_nothing_is_refused(monkeypatch, switch):
    network = build(VIT)

    def refuse(*_):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(type(network.backbone.body), "set_grad_checkpointing", switch or refuse)
    with pytest.raises(RecipeError, match=r"'vit_tiny_patch16_224' cannot compute its blocks again.*checkpointing = false"):
        adapt(network, Tuning(checkpointing=True), generator())


# --- a whole run


@pytest.mark.slow
def test_fine_tuning_a_model_folder_with_lora_gives_a_plain_model_folder(tile_sets, tmp_path):  # noqa: F811
    options = {"depth": 4, "embed_dim": 32, "num_heads": 2, "init_values": 0.3}
    network = {
        "backbone": "vit_small_patch16_dinov3", "backbone_options": options, "taps": [0, 1, 2, 3], "align_corners": True,
        "decoder_channels": 8, "head_channels": 8, "bins": {"count": 16, "max_m": 24.0, "spacing": "linear"},
        "normalisation": "linear",
    }  # fmt: skip
    imported = build(NetworkConfig.model_validate(network))
    contract = Contract(
        name="imported", version="1", description="random", licence="none", network=imported.config, bands=BANDS["rgb"],
        gsd_range_m=(0.4, 0.6), dtype="uint8", value_range=(0, 255), mean=(110.0, 135.0, 80.0), std=(40.0, 50.0, 20.0),
        window_px=64, stride_px=48,
        training=Training(sites=("ELSEWHERE",), tile_sets={}, recipe_sha256="0" * 64, footprints_deg=((0, 0, 1, 1),)),
    )  # fmt: skip
    pixels = torch.randint(0, 256, (3, 64, 96), generator=generator(), dtype=torch.uint8)
    save_model(tmp_path / "imported", network=imported, contract=contract, card="", fixture_image=pixels)
    path = recipe(tile_sets, tmp_path / "recipes", model__network=network, model__start_from="../imported", optim__steps=3)
    with path.open("a", encoding="utf-8") as file:
        file.write('\n[tuning]\nbackbone = "lora"\nlora_rank = 4\nlora_layers = ["qkv"]\ncheckpointing = true\n')
    folders = tmp_path / "imported", train(path)
    before, after = (load_model(folder).network.state_dict() for folder in folders)
    assert after.keys() == before.keys()
    changed = before.keys() - bit_equal(before, after)
    assert {name for name in changed if name.startswith("backbone.")} == {
        f"backbone.body.blocks.{block}.attn.qkv.weight" for block in range(4)
    }
    assert {name.split(".")[0] for name in changed} == {"backbone", "reassemble", "decoder", "head"}
