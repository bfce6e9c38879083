"""Imported weights give the heights of the programs they come from; anything that is not such weights is refused in a line.

The reference is transformers' CHMv2 with random weights. Its LayerScale is raised: at the published start of 1e-5 the blocks
hardly act, and a wrong mapping would pass (there is a test that it would). The authors' own layout is made from the same
weights by a mapping written out here a second time; checkpoints of both publications' own programs come with the samples.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CHMv2Config, CHMv2ForDepthEstimation
from transformers.utils import logging as transformers_logging

import canopy
from canopy.errors import CanopyError, ContractError
from canopy.model import foreign
from canopy.model.package import CARD, load_model, read_contract
from canopy.model.pull import read_sources

transformers_logging.disable_progress_bar()

TOLERANCE_M = 1e-3
"""What the import is judged by; the largest difference measured is 4e-5 m."""

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.420, 0.411, 0.296), (0.213, 0.156, 0.143)))
SHAPES = ((64, 64), (96, 160), (160, 32), (224, 224))
TINY = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, "num_register_tokens": 4,
    "out_indices": [1, 2, 3, 4], "key_bias": False, "layer_norm_eps": 1e-5,
}  # fmt: skip
FEATURES = {"model_type": "dinov3_vit", "reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True}


def reference(layer_scale=(0.1, 0.4), head=None, **backbone):
    """transformers' CHMv2 with weights that make every part of it count."""
    sizes = {"post_process_channels": [16, 16, 32, 32], "fusion_hidden_size": 32, "head_hidden_size": 16}
    config = CHMv2Config(backbone_config={**FEATURES, **TINY, **backbone}, **(sizes if head is None else head))
    return randomise(CHMv2ForDepthEstimation(config).eval(), layer_scale)


@torch.no_grad()
def randomise(model, layer_scale):
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lambda1" in name:
            p.uniform_(*layer_scale, generator=draw)
        elif "norm" in name and name.endswith("weight"):
            p.uniform_(0.7, 1.3, generator=draw)
        elif p.ndim > 1 and "token" not in name:
            p.normal_(0, p[0].numel() ** -0.5, generator=draw)
        else:
            p.normal_(0, 0.1, generator=draw)
    return model


def authors_layout(model):
    """(backbone, head) of a transformers model under the authors' names, with all that their files hold besides."""
    s = {key.replace("backbone.model.layer.", "backbone.layer."): v.clone() for key, v in model.state_dict().items()}
    d = s["backbone.embeddings.cls_token"].shape[-1]
    depth = model.config.backbone_config.num_hidden_layers
    heads = model.config.backbone_config.num_attention_heads
    draw = torch.Generator().manual_seed(2)
    back = {
        "cls_token": s["backbone.embeddings.cls_token"], "storage_tokens": s["backbone.embeddings.register_tokens"],
        "mask_token": s["backbone.embeddings.mask_token"][0], "local_cls_norm.weight": torch.rand(d, generator=draw),
        "local_cls_norm.bias": torch.rand(d, generator=draw),
        "rope_embed.periods": 100.0 ** (torch.arange(d // heads // 4) / (d // heads // 4)),
    }  # fmt: skip
    for leaf in ("weight", "bias"):
        back[f"patch_embed.proj.{leaf}"] = s[f"backbone.embeddings.patch_embeddings.{leaf}"]
        back[f"norm.{leaf}"] = s[f"backbone.norm.{leaf}"]
    for i in range(depth):
        a, b = f"backbone.layer.{i}", f"blocks.{i}"
        for theirs, ours in (("norm1",) * 2, ("norm2",) * 2, ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"),
                             ("mlp.fc2", "mlp.down_proj")):  # fmt: skip
            for leaf in ("weight", "bias"):
                back[f"{b}.{theirs}.{leaf}"] = s[f"{a}.{ours}.{leaf}"]
        back[f"{b}.attn.qkv.weight"] = torch.cat([s[f"{a}.attention.{x}_proj.weight"] for x in "qkv"])
        # What the mask takes away is noise in their files, and must not act.
        noise = torch.randn(d, generator=draw)
        back[f"{b}.attn.qkv.bias"] = torch.cat([s[f"{a}.attention.q_proj.bias"], noise, s[f"{a}.attention.v_proj.bias"]])
        back[f"{b}.attn.qkv.bias_mask"] = torch.cat([torch.ones(d), torch.zeros(d), torch.ones(d)])
        for n in (1, 2):
            back[f"{b}.ls{n}.gamma"] = s[f"{a}.layer_scale{n}.lambda1"]
    names = {
        "head.reassemble_stage.layers.{i}.projection": "reassemble_blocks.projects.{i}.conv",
        "head.reassemble_stage.layers.{i}.resize": "reassemble_blocks.resize_layers.{i}",
        "head.reassemble_stage.readout_projects.{i}.0": "reassemble_blocks.readout_projects.{i}.0",
        "head.convs.{i}": "convs.{i}.conv",
        "head.fusion_layers.{i}.projection": "fusion_blocks.{i}.project.conv",
        "head.conv_depth.head.{i}": "conv_depth.head.{i}",
        **{
            f"head.fusion_layers.{{i}}.residual_layer{u}.convolution{n}": f"fusion_blocks.{{i}}.res_conv_unit{u}.conv{n}.conv"  # noqa: E501
            for u, n in ((1, 1), (1, 2), (2, 1), (2, 2))
        },
    }
    head = {
        f"{b.format(i=i)}.{leaf}": s[key]
        for a, b in names.items()
        for i in range(5)
        for leaf in ("weight", "bias")
        if (key := f"{a.format(i=i)}.{leaf}") in s
    }
    return back, head


def save_two(folder, back, head):
    folder.mkdir(parents=True)
    torch.save(back, folder / "backbone.pth")
    torch.save(head, folder / "head.pth")
    return folder


def worst(folder, model, shapes=SHAPES[:2], batch=1):
    """Largest difference in metres between an imported model and its reference, over windows of several shapes."""
    imported, draw, largest = load_model(folder), torch.Generator().manual_seed(3), 0.0
    for shape in shapes:
        image = torch.randint(0, 256, (batch, 3, *shape), dtype=torch.uint8, generator=draw)
        with torch.no_grad():
            expected = model((image / 255.0 - MEAN) / STD).predicted_depth
        assert expected.std() > 0.1, "a reference that is nearly constant proves nothing"
        largest = max(largest, float((imported.predict(image).mean_m - expected).abs().max()))
    return largest


@pytest.fixture(scope="module")
def tiny():
    return reference()


@pytest.fixture(scope="module")
def tiny_hf(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "checkpoint"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def hf(tiny_hf, tmp_path):
    return Path(shutil.copytree(tiny_hf, tmp_path / "checkpoint"))


def change(folder, edit):
    """Edits the tensors of a checkpoint folder in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    table = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        (table["backbone_config"] if key in table["backbone_config"] and key != "model_type" else table)[key] = value
    (folder / "config.json").write_text(json.dumps(table))


# --- equivalence ---------------------------------------------------------------------------------------------------------


def test_a_hugging_face_checkpoint_gives_the_heights_of_transformers(tiny, tiny_hf, tmp_path):
    said = []
    assert foreign.import_model("chmv2", tiny_hf, tmp_path / "m", say=said.append) == tmp_path / "m"
    assert worst(tmp_path / "m", tiny, SHAPES, batch=2) <= TOLERANCE_M / 10
    assert said == ["left out, for no height depends on them: 1 of backbone.embeddings"]
    contract = read_contract(tmp_path / "m")
    assert contract.bands == ("red", "green", "blue")
    assert contract.mean == pytest.approx([107.1, 104.805, 75.48])
    assert contract.std == pytest.approx([54.315, 39.78, 36.465])
    assert contract.licence == "DINOv3 License"
    assert contract.calibration is None
    assert contract.metrics == {}
    assert contract.network.bins.count == 256
    assert contract.training.footprints_deg == ((-180.0, -90.0, 180.0, 90.0),), "nobody knows where it has not been"


@pytest.mark.parametrize(
    "backbone",
    [
        {"layer_norm_eps": 1e-6}, {"key_bias": True}, {"rope_theta": 50.0}, {"num_register_tokens": 0},
        {"num_hidden_layers": 6, "out_indices": [1, 2, 4, 5]}, {"intermediate_size": 160}, {"num_attention_heads": 2},
    ],
    ids=str,
)  # fmt: skip
def test_its_config_decides_what_tensors_do_not_show(backbone, tmp_path):
    model = reference(**backbone)
    model.save_pretrained(tmp_path / "hf")
    foreign.import_model("chmv2", tmp_path / "hf", tmp_path / "m")
    assert worst(tmp_path / "m", model, SHAPES[1:2]) <= TOLERANCE_M / 10


def test_blocks_under_their_newer_name_and_in_shards_are_the_same_checkpoint(tiny, hf, tmp_path):
    tensors = load_file(hf / "model.safetensors")
    tensors = {key.replace("backbone.layer.", "backbone.model.layer."): value for key, value in tensors.items()}
    (hf / "model.safetensors").unlink()
    keys = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": keys[:50], "model-00002-of-00002.safetensors": keys[50:]}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, hf / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    foreign.import_model("chmv2", hf, tmp_path / "m")
    assert worst(tmp_path / "m", tiny) <= TOLERANCE_M / 10
    (hf / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ContractError, match=r"model-00002-of-00002\.safetensors is missing"):
        foreign.import_model("chmv2", hf, tmp_path / "n")


def test_the_authors_two_files_give_the_same_heights_however_they_are_given(tiny, tmp_path):
    back, head = authors_layout(tiny)
    folder = save_two(tmp_path / "two", back, head)
    joint = {f"encoder.backbone.{k}": v for k, v in back.items()} | {f"decoder.{k}": v for k, v in head.items()}
    torch.save(joint, tmp_path / "joint.pth")
    nested = {"model": {f"module._orig_mod.{k}": v for k, v in joint.items()}, "epoch": 3}
    torch.save(nested, tmp_path / "nested.pth", _use_new_zipfile_serialization=False)
    said = []
    ways = {
        "folder": folder, "pair": (folder / "head.pth", folder / "backbone.pth"), "joint": tmp_path / "joint.pth",
        "nested": tmp_path / "nested.pth",
    }  # fmt: skip
    for name, source in ways.items():
        foreign.import_model("chmv2", source, tmp_path / name, say=said.append)
        assert worst(tmp_path / name, tiny) <= TOLERANCE_M / 10
    assert "nested.pth: tensors taken from 'model', 1 other entries left out" in said
    assert "nested.pth: '_orig_mod', 'module' left out of the tensors' names" in said
    assert "'_orig_mod', 'module'" in (tmp_path / "nested" / CARD).read_text()


def test_the_rotary_periods_are_those_of_the_checkpoint(tiny, tmp_path):
    back, head = authors_layout(tiny)
    back["rope_embed.periods"] = (back["rope_embed.periods"] * 1.01).bfloat16()
    foreign.import_model("chmv2", save_two(tmp_path / "two", back, head), tmp_path / "m")
    periods = back["rope_embed.periods"].float()
    assert read_contract(tmp_path / "m").network.rope_periods == tuple(periods.tolist())
    assert worst(tmp_path / "m", tiny) > TOLERANCE_M, "the control: other periods are other heights"
    rope = tiny.backbone.rope_embeddings
    before, rope.inv_freq = rope.inv_freq, 1 / periods
    try:
        assert worst(tmp_path / "m", tiny) <= TOLERANCE_M / 10
    finally:
        rope.inv_freq = before
    network = load_model(tmp_path / "m").network
    assert torch.equal(network.to(torch.bfloat16).backbone.body.rope.periods, periods), "casting must not undo them"


SWAPS = {
    "blocks": ("backbone.layer.1.", "backbone.layer.2."),
    "keys and values": (".k_proj.weight", ".v_proj.weight"),
    "scales": ("layer_scale1", "layer_scale2"),
    "norms": ("layer.2.norm1", "layer.2.norm2"),
    "readouts": ("readout_projects.0.0", "readout_projects.1.0"),
    "fusions": ("fusion_layers.1.", "fusion_layers.2."),
    "units": ("residual_layer1", "residual_layer2"),
    "convolutions": ("convolution1", "convolution2"),
    "maps": ("head.convs.2.", "head.convs.3."),
}


def swapped(tensors, pair):
    return {
        **tensors,
        **{
            a: tensors[b].clone()
            for one, other in (pair, pair[::-1])
            for a in tensors
            if one in a and (b := a.replace(one, other)) in tensors and tensors[b].shape == tensors[a].shape
        },
    }


@pytest.mark.parametrize("pair", SWAPS.values(), ids=SWAPS)
def test_control_swapped_tensors_are_other_heights(pair, tiny, hf, tmp_path):
    tensors = load_file(hf / "model.safetensors")
    save_file(swapped(tensors, pair), hf / "model.safetensors", metadata={"format": "pt"})
    foreign.import_model("chmv2", hf, tmp_path / "m")
    assert worst(tmp_path / "m", tiny, SHAPES[:1]) > TOLERANCE_M


def test_control_at_the_published_start_of_layer_scale_a_wrong_mapping_would_pass(tmp_path):
    model = reference(layer_scale=(1e-5, 1.1e-5))
    model.save_pretrained(tmp_path / "hf")
    tensors = swapped(load_file(tmp_path / "hf" / "model.safetensors"), SWAPS["blocks"])
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    foreign.import_model("chmv2", tmp_path / "hf", tmp_path / "m")
    assert worst(tmp_path / "m", model, SHAPES[:1]) <= TOLERANCE_M, "which is why the other tests raise it"


def test_control_another_epsilon_or_a_bias_of_the_keys_is_other_heights(tmp_path):
    model = reference()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embeddings" in name:  # small tokens, on which the epsilon acts as on the real ones
                p.mul_(0.03)
    back, head = authors_layout(model)
    foreign.import_model("chmv2", save_two(tmp_path / "two", back, head), tmp_path / "m")
    assert worst(tmp_path / "m", model) <= TOLERANCE_M / 10
    model.save_pretrained(tmp_path / "hf")
    configure(tmp_path / "hf", layer_norm_eps=1e-6)
    foreign.import_model("chmv2", tmp_path / "hf", tmp_path / "eps")
    assert worst(tmp_path / "eps", model) > TOLERANCE_M
    unmasked = {key: value for key, value in back.items() if "bias_mask" not in key}
    foreign.import_model("chmv2", save_two(tmp_path / "unmasked", unmasked, head), tmp_path / "keys")
    assert worst(tmp_path / "keys", model) > TOLERANCE_M


@pytest.mark.parametrize(("kind", "folder"), [("chmv2", "chmv2_meta"), ("chmv1", "chmv1")])
def test_checkpoints_of_the_publications_own_programs(kind, folder, samples, tmp_path):
    source = samples / "reference" / "conformance" / folder
    canopy.import_model(kind, source, tmp_path / "m")
    model, known = load_model(tmp_path / "m"), np.load(source / "io.npz")
    for i in range(len(known.files) // 2):
        heights = model.predict(known[f"image_{i}"])
        assert np.abs(heights.mean_m.numpy() - known[f"height_m_{i}"][:, 0]).max() <= TOLERANCE_M / 10
        assert not heights.abstain.any()
        assert (heights.spread_m > 0).all(), "neither publication has it"


@pytest.mark.slow
def test_the_real_size_gives_the_heights_of_transformers(tmp_path):
    model = reference(
        head={}, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
        out_indices=[6, 12, 18, 24],
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 336_876_800
    model.save_pretrained(tmp_path / "hf")
    foreign.import_model("chmv2", tmp_path / "hf", tmp_path / "m")
    shutil.rmtree(tmp_path / "hf")
    assert worst(tmp_path / "m", model, ((96, 160), (224, 224))) <= TOLERANCE_M


def test_published_heights_of_the_published_weights(tmp_path):
    """CANOPY_CHMV2: folder with the gated Hugging Face checkpoint and the example image of its processor."""
    folder = os.environ.get("CANOPY_CHMV2", "")
    if not folder:
        pytest.skip("CANOPY_CHMV2 is not set: the published weights are given to people who ask for them")
    from canopy.raster import read_raster

    check = read_sources()["chmv2-hugging-face"].check
    foreign.import_model("chmv2", folder, tmp_path / "m")
    image = torch.as_tensor(read_raster(Path(folder) / check.image).data[:3])
    rows, cols = ((size - side) for size, side in zip(check.padded_px, image.shape[1:], strict=True))
    x = torch.nn.functional.pad(
        (image / 255.0 - MEAN) / STD, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2)
    )  # as its processor does
    with torch.inference_mode():
        heights = load_model(tmp_path / "m").network.distribution(x[None]).mean_m[0]
    expected = torch.tensor(check.top_left_m)
    assert (heights[:3, :3] - expected).abs().max() <= check.tolerance_m


# --- CHMv1 ---------------------------------------------------------------------------------------------------------------


def chmv1_state(d=64, depth=4, c=(16, 16, 32, 32), width=32, meta=False):
    """A checkpoint in the layout of HighResCanopyHeight."""
    draw = torch.Generator().manual_seed(4)
    shapes = {
        "backbone.cls_token": (1, 1, d), "backbone.pos_embed": (1, 197, d), "backbone.mask_token": (1, d),
        "backbone.patch_embed.proj.weight": (d, 3, 16, 16), "backbone.patch_embed.proj.bias": (d,),
        "backbone.norm.weight": (d,), "backbone.norm.bias": (d,),
    }  # fmt: skip
    for i in range(depth):
        b = f"backbone.blocks.{i}"
        for name, shape in (
            ("attn.qkv", (3 * d, d)),
            ("attn.proj", (d, d)),
            ("mlp.fc1", (4 * d, d)),
            ("mlp.fc2", (d, 4 * d)),
        ):
            shapes |= {f"{b}.{name}.weight": shape, f"{b}.{name}.bias": shape[:1]}
        shapes |= {f"{b}.{name}.{leaf}": (d,) for name in ("norm1", "norm2") for leaf in ("weight", "bias")}
        shapes |= {f"{b}.ls{n}.gamma": (d,) for n in (1, 2)}
    h = "decode_head"
    for i in range(4):
        shapes |= {
            f"{h}.reassemble_blocks.projects.{i}.conv.weight": (c[i], d, 1, 1),
            f"{h}.reassemble_blocks.projects.{i}.conv.bias": (c[i],),
            f"{h}.reassemble_blocks.readout_projects.{i}.0.weight": (d, 2 * d),
            f"{h}.reassemble_blocks.readout_projects.{i}.0.bias": (d,),
            f"{h}.convs.{i}.conv.weight": (width, c[i], 3, 3),
            f"{h}.fusion_blocks.{i}.project.conv.weight": (width, width, 1, 1),
            f"{h}.fusion_blocks.{i}.project.conv.bias": (width,),
        }
        for u in (1, 2) if i else (2,):
            for n in (1, 2):
                shapes[f"{h}.fusion_blocks.{i}.res_conv_unit{u}.conv{n}.conv.weight"] = (width, width, 3, 3)
    for i, k in ((0, 4), (1, 2), (3, 3)):
        shapes |= {f"{h}.reassemble_blocks.resize_layers.{i}.weight": (c[i], c[i], k, k)}
        shapes |= {f"{h}.reassemble_blocks.resize_layers.{i}.bias": (c[i],)}
    ends = {"project.conv": (width, width, 3, 3), "conv_depth.head.0": (width // 2, width, 3, 3)}
    ends |= {"conv_depth.head.2": (32, width // 2, 3, 3), "conv_depth.head.4": (256, 32, 1, 1)}
    for name, shape in ends.items():
        shapes |= {f"{h}.{name}.weight": shape, f"{h}.{name}.bias": shape[:1]}
    if meta:
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {
        key: torch.randn(shape, generator=draw) * (0.3 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)
        for key, shape in shapes.items()
    }


def save_chmv1(folder, state, config=True):
    folder.mkdir(parents=True)
    torch.save({"state_dict": state}, folder / "checkpoint.pth")
    if config:
        (folder / "config.json").write_text(json.dumps({"num_heads": 4, "taps": [0, 1, 2, 3]}))
    return folder


def test_chmv1_is_imported_from_a_file_or_its_folder(tmp_path):
    folder = save_chmv1(tmp_path / "v1", chmv1_state())
    foreign.import_model("chmv1", folder, tmp_path / "a")
    foreign.import_model("chmv1", folder / "checkpoint.pth", tmp_path / "b", name="Tolan")
    contract = read_contract(tmp_path / "b")
    assert contract.name == "Tolan"
    assert contract.licence == "Apache-2.0"
    assert (contract.window_px, contract.stride_px) == (256, 192)
    assert contract.network.bins.centres_m()[[0, -1]].tolist() == pytest.approx([0.01, 100.0])
    assert not contract.network.tap_norm
    image = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8)
    assert torch.equal(*(load_model(tmp_path / each).predict(image).mean_m for each in "ab"))


def test_8_bit_weights_are_what_they_stand_for(tmp_path):
    state = chmv1_state()
    packed, plain = dict(state), dict(state)
    for key in [key for key in state if key.endswith(("attn.qkv.weight", "mlp.fc1.weight"))]:
        layer = key.removesuffix(".weight")
        weight = torch.quantize_per_tensor(packed.pop(key), 0.002, 0, torch.qint8)
        bias = packed.pop(f"{layer}.bias")
        packed[f"{layer}.scale"], packed[f"{layer}.zero_point"] = torch.tensor(1.0), torch.tensor(0)
        packed[f"{layer}._packed_params.dtype"] = torch.qint8
        packed[f"{layer}._packed_params._packed_params"] = (weight, torch.nn.Parameter(bias))
        plain[key] = weight.dequantize()
    said = []
    foreign.import_model("chmv1", save_chmv1(tmp_path / "p", packed), tmp_path / "a", say=said.append)
    foreign.import_model("chmv1", save_chmv1(tmp_path / "q", plain), tmp_path / "b")
    foreign.import_model("chmv1", save_chmv1(tmp_path / "r", state), tmp_path / "c")
    image = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8)
    a, b, c = (load_model(tmp_path / each).predict(image).mean_m for each in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c), "the control: 8 bits are not 32"
    assert any("8 layers with 8-bit weights" in line for line in said)


@pytest.mark.parametrize(
    ("d", "depth", "heads", "taps"), [(1024, 24, 16, (4, 11, 17, 23)), (1280, 32, 20, (9, 16, 22, 29))], ids=["L", "H"]
)
def test_the_published_sizes_of_chmv1_are_known(d, depth, heads, taps):
    c = tuple(d // 8 * n for n in (1, 2, 4, 8))
    checkpoint = foreign._Checkpoint(
        kind="chmv1", layout="chmv1", tensors=chmv1_state(d, depth, c, 256, meta=True), where={}, digests={Path("x"): ""},
        main=Path("x"),
    )  # fmt: skip
    config = foreign._chmv1(checkpoint).config
    assert config.backbone_options["num_heads"] == heads
    assert config.taps == taps
    assert config.channels() == c


def test_a_size_whose_heads_nobody_knows_needs_a_config(tmp_path):
    with pytest.raises(ContractError, match=r'width 64.*config.json with {"num_heads"'):
        foreign.import_model("chmv1", save_chmv1(tmp_path / "v1", chmv1_state(), config=False), tmp_path / "m")


# --- refusals ------------------------------------------------------------------------------------------------------------


def refused(source, out, match, kind="chmv2"):
    with pytest.raises(CanopyError, match=match) as caught:
        foreign.import_model(kind, source, out)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "no remedy"
    assert not out.exists()
    assert not list(out.parent.glob(".*.partial"))


NORM = "backbone.layer.2.norm2.weight"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), rf"lacks tensor {NORM}:"),
    "two missing": (lambda t: [t.pop(k) for k in ("backbone.norm.bias", NORM)], rf"tensors backbone.norm.bias, {NORM}:"),
    "unknown": (lambda t: t.update(extra=torch.ones(2)), "holds unknown tensor extra"),
    "misshapen": (lambda t: t.update({NORM: torch.ones(63)}), rf"{NORM} has shape \(63,\).*takes \(64,\)"),
    "integer": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)}), f"{NORM} is int32"),
    "NaN": (lambda t: t[NORM].fill_(float("nan")), f"{NORM} holds 64 values that are NaN or infinite"),
    "infinite": (lambda t: t[NORM][3:4].fill_(float("-inf")), f"{NORM} holds 1 values"),
    "no class token": (lambda t: t.pop("backbone.embeddings.cls_token"), "no chmv2 checkpoint"),
    "three blocks": (lambda t: [t.pop(k) for k in list(t) if ".layer.3." in k], "out_indices .* are not four of 3 blocks"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_named(edit, match, hf, tmp_path):
    change(hf, edit)
    refused(hf, tmp_path / "m", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "glpn"}, "is of a 'glpn' checkpoint, not chmv2"),
        ({"num_attention_heads": 5}, "does not divide the width 64"),
        ({"num_attention_heads": None}, "not a positive number"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu' cannot be imported; CHMv2 has 'gelu'"),
        ({"use_gated_mlp": True}, "use_gated_mlp"),
        ({"readout_type": "add"}, "readout_type"),
        ({"bins_strategy": "log"}, "bins_strategy 'log'"),
        ({"norm_strategy": "sigmoid"}, "norm_strategy 'sigmoid'"),
        ({"out_indices": [1, 2, 3]}, "not four of 4 blocks"),
        ({"min_depth": 100.0}, "describes no possible network"),
    ],
)
def test_a_config_of_another_network_is_refused(changes, match, hf, tmp_path):
    configure(hf, **changes)
    refused(hf, tmp_path / "m", match)


def test_half_precision_is_converted_and_said(tiny, hf, tmp_path):
    change(hf, lambda t: t.update({k: v.half() for k, v in t.items() if "mlp" in k}))
    said = []
    foreign.import_model("chmv2", hf, tmp_path / "m", say=said.append)
    assert "16 tensors converted from float16 to float32" in said
    assert TOLERANCE_M / 100 < worst(tmp_path / "m", tiny, SHAPES[:1]) < 0.1


def test_downloads_that_are_not_whole_are_refused(tiny, hf, tmp_path):
    back, head = authors_layout(tiny)
    two = save_two(tmp_path / "two", back, head)
    whole = (two / "head.pth").read_bytes()
    for content, match in (
        (whole[: len(whole) // 2], "ends early.*download it again"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><p>log in", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git LFS"),
        (b"\x80\x02}q\x00", "no checkpoint of plain tensors"),
    ):
        (two / "head.pth").write_bytes(content)
        refused(two, tmp_path / "m", match)
    weights = hf / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(hf, tmp_path / "m", "not a whole safetensors file")
    weights.unlink()
    refused(hf, tmp_path / "m", "neither model.safetensors nor")
    (hf / "config.json").write_text("{")
    refused(hf, tmp_path / "m", "not readable JSON")


class Code:
    """What a checkpoint must not bring along."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_file_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": Code()}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", tmp_path / "m", "no checkpoint of plain tensors")
    assert not (tmp_path / "ran").exists()


def test_a_name_with_a_hash_must_be_right(tiny, tmp_path):
    back, head = authors_layout(tiny)
    two = save_two(tmp_path / "two", back, head)
    (two / "head.pth").rename(two / "head-3703d643.pth")
    refused(two, tmp_path / "m", "its name says 3703d643: the file was altered or cut short")


def test_other_weights_are_recognised(tiny, hf, tmp_path):
    back, head = authors_layout(tiny)
    two = save_two(tmp_path / "two", back, head)
    refused(two / "head.pth", tmp_path / "m", "the backbone is missing")
    refused(two / "backbone.pth", tmp_path / "m", "the DPT head is missing")
    refused(two, tmp_path / "m", "looks like the DPT head of CHMv2.*import it as chmv2", kind="chmv1")
    refused(hf, tmp_path / "m", "'chmv2' checkpoint, not chmv1", kind="chmv1")
    v1 = save_chmv1(tmp_path / "v1", chmv1_state())
    refused(v1, tmp_path / "m", r"HighResCanopyHeight \(chmv1\); import it as chmv1")
    (hf / "config.json").unlink()
    refused(hf, tmp_path / "m", "without its config.json")
    for i, (key, what) in enumerate(
        (("layer1.0.conv1.weight", "a ResNet"), ("depth_head.scratch.x", "Depth Anything"), ("w", "its first tensor is w"))
    ):
        torch.save({key: torch.ones(3)}, tmp_path / f"{i}.pth")
        refused(tmp_path / f"{i}.pth", tmp_path / "m", what)
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", tmp_path / "m", "holds no tensors by name")
    refused(tmp_path / "nowhere", tmp_path / "m", "does not exist")
    refused(tmp_path / "nowhere", tmp_path / "m", "choose from chmv2, chmv1", kind="chmv3")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "m", "holds no file ending in")


def test_an_existing_folder_is_replaced_only_when_asked_and_the_random_state_is_left_alone(hf, tmp_path):
    state = torch.get_rng_state()
    foreign.import_model("chmv2", hf, tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CanopyError, match="exists"):
        foreign.import_model("chmv2", hf, tmp_path / "m")
    foreign.import_model("chmv2", hf, tmp_path / "m", name="again", overwrite=True)
    assert read_contract(tmp_path / "m").name == "again"


def test_pixels_for_which_no_bin_is_preferred_abstain(tiny, hf, tmp_path):
    change(hf, lambda t: t["head.conv_depth.head.4.bias"].fill_(-1e3))
    foreign.import_model("chmv2", hf, tmp_path / "m")
    heights = load_model(tmp_path / "m").predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert heights.abstain.all()
    assert heights.mean_m[0, 0, 0].item() == pytest.approx(33.147, abs=1e-3), "what the published code gives out as height"
