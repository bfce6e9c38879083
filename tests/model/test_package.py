"""Model folders: what is written can be read, and whatever is wrong with a folder is said in one line."""

import math
import re
import shutil
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import canopy
from canopy.errors import CanopyError, ContractError, OutputError
from canopy.model.calibration import CalibrationTable
from canopy.model.distribution import Bins
from canopy.model.network import HeightNetwork, NetworkConfig
from canopy.model.package import (
    FILES,
    PRECISION_TOLERANCE_M,
    Contract,
    Training,
    find_model,
    load_model,
    mirrored,
    normalise,
    read_contract,
    save_model,
)

NETWORK = NetworkConfig(
    backbone="pvt_v2_b0",
    backbone_options={"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)},
    decoder_channels=16,
    head_channels=8,
    bins=Bins(count=16),
)
CALIBRATION = CalibrationTable(
    edges_m=(0.0, 10.0), lower_factor=(1.5, 2.5), upper_factor=(2.0, 1.0), pixels=(5000, 9000), sites=("B",)
)
FIELDS = {
    "name": "tiny",
    "version": "1.2",
    "description": "made by a test",
    "licence": "CC0-1.0",
    "network": NETWORK,
    "bands": ("red", "green", "blue"),
    "gsd_range_m": (0.4, 0.8),
    "dtype": "uint8",
    "value_range": (0.0, 255.0),
    "mean": (100.0, 110.0, 90.0),
    "std": (50.0, 40.0, 45.0),
    "window_px": 64,
    "stride_px": 48,
    "training": Training(
        sites=("A", "B"),
        tile_sets={"autzen": "00ff"},
        recipe_sha256="abcd",
        footprints_deg=((-123.1, 44.0, -123.0, 44.1),),
    ),
    "metrics": {"site A": {"mae_m": 2.5, "n": 1000}},
}


def random_image(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def build(config=NETWORK, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeightNetwork(config).eval()


def write(folder, *, seed=0, overwrite=False, **changes):
    contract = Contract(**{**FIELDS, **changes})
    return save_model(
        folder,
        network=build(seed=seed),
        contract=contract,
        card="# tiny: Größe\n",
        fixture_image=random_image(3, 64, 64),
        overwrite=overwrite,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit_contract(folder, change):
    table = tomllib.loads((folder / "model.toml").read_text())
    change(table)
    (folder / "model.toml").write_text(tomli_w.dumps(table))


def edit_weights(folder, change, *, sign=True):
    state = load_file(folder / "weights.safetensors")
    change(state)
    save_file(state, folder / "weights.safetensors")
    if sign:
        digest = sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        edit_contract(folder, lambda table: table.update(weights_sha256=digest))


# --- round trip ----------------------------------------------------------------------------------------------------------


def test_a_saved_model_predicts_what_its_network_predicts(saved):
    model, network, image = load_model(saved), build(), random_image(2, 3, 64, 96)
    with torch.no_grad():
        expected = network.distribution(normalise(image, None, model.contract))
    got = model.predict(image)
    assert torch.equal(got.mean_m, expected.mean_m)
    assert torch.equal(got.spread_m, expected.spread_m)
    assert {path.name for path in saved.iterdir()} == set(FILES)
    assert (saved / "card.md").read_text(encoding="utf-8") == "# tiny: Größe\n"


def test_the_contract_survives_with_what_saving_adds(saved):
    contract = read_contract(saved)
    added = {"weights_sha256": contract.weights_sha256, "canopy_version": canopy.__version__}
    assert contract == Contract(**FIELDS, **added)
    assert contract.weights_sha256 == sha256((saved / "weights.safetensors").read_bytes()).hexdigest()


def test_a_calibration_table_survives(tmp_path):
    assert load_model(write(tmp_path / "m", calibration=CALIBRATION)).contract.calibration == CALIBRATION


def test_half_precision_storage_halves_the_file_and_its_fixture_holds(saved, tmp_path):
    half = write(tmp_path / "half", weights_dtype="float16")
    sizes = [(path / "weights.safetensors").stat().st_size for path in (half, saved)]
    assert sizes[0] < 0.6 * sizes[1]
    model = load_model(half)
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}


def test_loading_does_not_touch_the_global_generator(saved):
    state = torch.random.get_rng_state()
    load_model(saved)
    assert torch.equal(state, torch.random.get_rng_state())


# --- prediction ----------------------------------------------------------------------------------------------------------


def test_the_place_in_a_batch_does_not_change_a_bit(saved):
    model, image = load_model(saved), random_image(4, 3, 64, 64)
    order = [2, 0, 3, 1]
    a, b = model.predict(image), model.predict(image[order])
    assert torch.equal(a.mean_m[order], b.mean_m)
    assert torch.equal(a.spread_m[order], b.spread_m)


def test_what_is_under_an_unusable_pixel_does_not_matter(saved):
    model, image = load_model(saved), random_image(1, 3, 64, 64)
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[:, 10:20, 30:] = False
    other = torch.where(valid[:, None], image, 255 - image)
    assert torch.equal(model.predict(image, valid).mean_m, model.predict(other, valid).mean_m)
    assert not torch.equal(model.predict(image).mean_m, model.predict(other).mean_m)
    filled = normalise(image, valid, model.contract)
    assert (filled[:, :, 10:20, 30:] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(9, 2), (5, 7), (3, 16)])
def test_a_plot_is_mirrored_as_far_as_the_image_goes(height, width):
    plot = torch.rand(2, height, width)
    image, valid = torch.zeros(1, 2, 32, 48), torch.zeros(1, 32, 48, dtype=torch.bool)
    image[0, :, 11 : 11 + height, 20 : 20 + width] = plot
    valid[0, 11 : 11 + height, 20 : 20 + width] = True
    margins = ((0, 0), (11, 21 - height), (20, 28 - width))
    assert np.array_equal(mirrored(image, valid)[0].numpy(), np.pad(plot.numpy(), margins, mode="reflect"))
    assert (image[~valid[:, None].expand_as(image)] == 0).all()  # the input is left as it is


def test_a_missing_corner_is_mirrored_in_its_nearer_edge():
    image, valid = torch.arange(64.0).reshape(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, :3, :3] = False
    out = mirrored(image, valid)[0, 0]
    assert [out[0, 1], out[1, 2], out[1, 0], out[2, 1]] == [image[0, 0][at] for at in ((0, 5), (1, 4), (5, 0), (4, 1))]
    assert torch.equal(out[valid[0]], image[0, 0][valid[0]])


def test_what_is_one_pixel_wide_is_repeated():
    image, valid = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    image[0, 0, 2, 1], valid[0, 2, 1] = 5.0, True
    assert (mirrored(image, valid) == 5).all()


def test_there_is_nothing_to_mirror_in_a_whole_image_nor_in_none():
    image, valid = torch.rand(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    assert mirrored(image, valid) is image
    valid[1] = False
    assert torch.equal(mirrored(image, valid), image)


def test_a_model_that_mirrors_does_not_see_how_large_the_imagery_is(folder, tmp_path):
    mirrors = load_model(write(tmp_path / "mirrors", fill="mirror"))
    image, valid = random_image(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, 16:48, 16:48] = True
    rows = np.abs(np.arange(64) - 16)
    rows = torch.from_numpy(np.where(rows > 31, 62 - rows, rows) + 16)
    whole = image[:, :, rows][:, :, :, rows]
    assert torch.equal(mirrors.predict(image, valid).mean_m[valid], mirrors.predict(whole).mean_m[valid])
    plain = load_model(folder)
    assert not torch.equal(plain.predict(image, valid).mean_m[valid], plain.predict(whole).mean_m[valid])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_units_matter_and_data_types_do_not(saved, dtype):
    model, image = load_model(saved), random_image(1, 3, 64, 64)
    assert torch.equal(model.predict(image.numpy().astype(dtype)).mean_m, model.predict(image).mean_m)


@pytest.mark.parametrize("value", [256.0, -1.0, float("nan")])
def test_a_usable_value_outside_the_contract_is_refused_and_a_masked_one_is_not(saved, value):
    model, image = load_model(saved), random_image(1, 3, 64, 64).float()
    image[0, 1, 5, 6] = value
    with pytest.raises(ContractError, match="outside the 0 to 255 of tiny"):
        model.predict(image)
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[0, 5, 6] = False
    assert model.predict(image, valid).mean_m.isfinite().all()


@pytest.mark.parametrize(("shape", "message"), [((1, 4, 64, 64), "4 bands"), ((1, 3, 64, 60), "multiple of 32")])
def test_images_of_another_shape_are_refused(saved, shape, message):
    with pytest.raises(ContractError, match=message):
        load_model(saved).predict(torch.zeros(shape, dtype=torch.uint8))


# --- precision, compilation, memory --------------------------------------------------------------------------------------


@pytest.fixture
def any_device(monkeypatch):
    """Reduced precision on the CPU too: slow or off there, and the same code as on a GPU."""
    monkeypatch.setattr("canopy.model.package._usable_precision", lambda precision, _: precision)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int8", "precision 'int8' is unknown; choose float32, float16, bfloat16"),
        ("bfloat16", "bfloat16 is for GPUs: .* choose float32"),
        ("float16", "float16 is for GPUs: .* choose float32"),
    ],
)
def test_a_precision_the_device_does_not_gain_from_is_refused(saved, precision, message):
    assert load_model(saved, precision="float32").precision == "float32"
    with pytest.raises(ContractError, match=message) as caught:
        load_model(saved, precision=precision)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_heights_in_reduced_precision_are_near_and_their_distribution_is_float32(saved, precision):
    full, model, image = load_model(saved), load_model(saved, precision=precision), random_image(2, 3, 64, 96)
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, precision)}
    assert {p.dtype for p in full.network.parameters()} == {torch.float32}, "another model, not the same one changed"
    expected, got = full.predict(image), model.predict(image)
    assert got.logits_bnhw.dtype == getattr(torch, precision)
    assert got.mean_m.dtype == got.spread_m.dtype == torch.float32
    for name in ("mean_m", "spread_m"):
        off_m = (getattr(got, name) - getattr(expected, name)).abs().max().item()
        assert 0 < off_m < PRECISION_TOLERANCE_M[precision], f"{name}: {off_m} m; 0 would be float32 after all"


@pytest.mark.usefixtures("any_device")
def test_a_model_too_large_for_float16_is_refused_in_it_and_works_in_bfloat16(tmp_path):
    network = build()
    with torch.no_grad():  # 2**20 in the middle of the head and out again changes nothing that float32 or bfloat16 can see
        for part in (network.head.conv1.weight, network.head.conv1.bias):
            part.mul_(2.0**20)
        network.head.conv2.weight.mul_(2.0**-20)
    folder = save_model(
        tmp_path / "m", network=network, contract=Contract(**FIELDS), card="", fixture_image=random_image(3, 64, 64)
    )
    load_model(folder, precision="bfloat16")
    with pytest.raises(
        ContractError, match=r"comes out nan m .* in float16, more than 0\.05 m: .* choose another --precision"
    ):
        load_model(folder, precision="float16")


def test_autocast_around_a_prediction_changes_nothing(saved):
    model, image = load_model(saved), random_image(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.predict(image)
        loosely = model.network(normalise(image, None, model.contract))
    assert torch.equal(inside.mean_m, model.predict(image).mean_m)
    assert loosely.dtype == torch.bfloat16, "the control: autocast does reach a bare network"


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_lower_precision_of_products_around_a_prediction_changes_nothing(saved, precision):
    """Some libraries ask for it when they are imported. It is the process's, and two threads may predict at once."""
    model, image = load_model(saved), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    alone = model.predict(image).mean_m
    kind, before = torch.backends.mkldnn.matmul, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        lowered = kind.fp32_precision
        assert lowered not in {"ieee", "none"}, "the control: it is lowered outside"
        with ThreadPoolExecutor(max_workers=4) as pool:
            for heights in pool.map(lambda _: model.predict(image).mean_m, range(20)):
                assert torch.equal(heights, alone)
        assert kind.fp32_precision == lowered, "left as it was"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_a_compiled_model_predicts_what_the_plain_one_does(saved):
    plain, model, image = load_model(saved), load_model(saved, compile=True), random_image(1, 3, 64, 64)
    for name in ("mean_m", "spread_m"):
        assert torch.allclose(getattr(model.predict(image), name), getattr(plain.predict(image), name), atol=1e-3, rtol=0)
    assert model.network.state_dict().keys() == plain.network.state_dict().keys()


def test_what_the_compiler_makes_is_checked_on_each_new_shape(saved):
    model, image = load_model(saved, compile=True), random_image(1, 3, 64, 64)
    model.compiled.run = model.network  # instead of half a minute of compiling
    model.predict(image)
    model.compiled.run = lambda x_bchw: model.network(x_bchw).roll(1, dims=1)
    model.predict(image)  # this shape has been checked
    with pytest.raises(CanopyError, match=r"compiled network is up to .* off the plain one, more than 0\.01 m; run without"):
        model.predict(random_image(1, 3, 64, 96))
    model.compiled.run = lambda x_bchw: model.network(x_bchw) * float("nan")
    with pytest.raises(CanopyError, match="run without --compile"):
        model.predict(random_image(1, 3, 96, 96))


def test_a_compiler_that_fails_is_one_line(saved):
    def fails(_):
        raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no C++ compiler\nfound"), None)

    model = load_model(saved, compile=True)
    model.compiled.run = fails
    with pytest.raises(CanopyError, match=r"cannot be compiled here .*no C.. compiler.*; run without --compile") as caught:
        model.predict(random_image(1, 3, 64, 64))
    assert "\n" not in str(caught.value)


def test_an_image_beyond_memory_is_one_line_with_the_remedy(saved):
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(1, 3, 640_000, 640_000)
    with pytest.raises(CanopyError, match=r"cpu has not enough memory for 1 window of 640000 x 640000 px .* smaller model"):
        load_model(saved).predict(image)


@pytest.mark.parametrize(
    ("count", "device", "remedy"),
    [(8, "cuda", "--batch 4"), (1, "cuda", "--precision float16 or --device cpu"), (2, "cpu", "--batch 1")],
)
def test_a_device_without_memory_for_the_network_names_what_helps(saved, count, device, remedy):
    model = replace(load_model(saved), device=torch.device(device))
    message = f"{device} has not enough memory for {count} window.* in float32; .*{remedy}"
    with pytest.raises(CanopyError, match=message) as caught, model._within_memory(random_image(count, 3, 64, 64)):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
    assert "\n" not in str(caught.value)


def test_another_error_of_the_network_is_not_taken_for_a_lack_of_memory(saved, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = load_model(saved)
    monkeypatch.setattr(type(model.network), "forward", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.predict(random_image(1, 3, 64, 64))


# --- contract ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gsd_m", [0.4, 0.6, 0.8, 0.8 * (1 + 1e-9)])
def test_imagery_inside_the_contract_passes(gsd_m):
    Contract(**FIELDS).check_imagery(band_count=3, dtype="uint8", gsd_m=gsd_m)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band_count": 4}, r"4 bands, but tiny takes 3 \(red, green, blue\).*--bands"),
        ({"dtype": "uint16"}, "uint16, but tiny takes uint8 from 0 to 255; rescale"),
        ({"gsd_m": 2.0}, "GSD 2 m is outside the 0.4 to 0.8 m of tiny; resample with --gsd 0.8"),
        ({"gsd_m": 0.1}, "resample with --gsd 0.4"),
        ({"gsd_m": float("nan")}, "outside"),
    ],
)
def test_imagery_outside_the_contract_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ContractError, match=message):
        Contract(**FIELDS).check_imagery(**{"band_count": 3, "dtype": "uint8", "gsd_m": 0.6, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"window_px": 100},
        {"stride_px": 64},
        {"mean": (1.0, 2.0)},
        {"std": (1.0, 0.0, 1.0)},
        {"gsd_range_m": (0.8, 0.4)},
        {"gsd_range_m": (0.0, 0.4)},
        {"value_range": (0.0, math.inf)},
        {"bands": ("red",)},
        {"metrics": {"a": {"b": "good"}}},
        {"metrics": {"a": math.nan}},
        {"unknown": 1},
        {"weights_sha256": "12"},
    ],
)
def test_impossible_contracts_are_refused(changes):
    with pytest.raises(ValidationError):
        Contract(**{**FIELDS, **changes})


def test_footprints_are_longitudes_and_latitudes():
    with pytest.raises(ValidationError, match="west, south, east, north"):
        Training(sites=(), tile_sets={}, recipe_sha256="", footprints_deg=((500000.0, 0.0, 500100.0, 10.0),))


# --- broken folders ------------------------------------------------------------------------------------------------------


def swap_filters(state):
    state["head.conv2.weight"] = state["head.conv2.weight"].flip(0).contiguous()


def rename(state, change):
    for name in list(state):
        state[change(name)] = state.pop(name)


def misshape(state):
    state["head.conv1.bias"] = torch.zeros(9)


BROKEN = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no contract": (lambda f: (f / "model.toml").unlink(), r"model\.toml is missing"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), r"weights\.safetensors is missing"),
    "no fixture": (lambda f: (f / "fixture.safetensors").unlink(), r"fixture\.safetensors is missing"),
    "not TOML": (lambda f: (f / "model.toml").write_text("name = "), r"model\.toml is no TOML file"),
    "unknown key": (lambda f: edit_contract(f, lambda t: t.update(colour=1)), "unknown key 'colour'"),
    "unknown network key": (
        lambda f: edit_contract(f, lambda t: t["network"].update(depth=1)),
        "unknown key 'network.depth'",
    ),
    "missing key": (lambda f: edit_contract(f, lambda t: t.pop("bands")), "key 'bands' is missing"),
    "missing key with a default": (
        lambda f: edit_contract(f, lambda t: t["network"].pop("tap_norm")),
        "network.tap_norm is missing",
    ),
    "wrong value": (lambda f: edit_contract(f, lambda t: t.update(window_px=100)), "multiple of 32"),
    "newer format": (lambda f: edit_contract(f, lambda t: t.update(format=2)), "format"),
    "backbone unknown": (lambda f: edit_contract(f, lambda t: t["network"].update(backbone="x")), "no backbone 'x'"),
    "altered weights": (lambda f: edit_weights(f, swap_filters, sign=False), "altered or cut short"),
    "truncated weights": (
        lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-100]),
        "altered or cut short",
    ),
    "missing tensor": (lambda f: edit_weights(f, lambda s: s.pop("head.conv1.bias")), "lacks tensor head.conv1.bias"),
    "unknown tensor": (lambda f: edit_weights(f, lambda s: s.update(extra=torch.zeros(1))), "unknown tensor extra"),
    "misshapen tensor": (lambda f: edit_weights(f, misshape), r"head.conv1.bias has shape \(9,\), not \(8,\)"),
    "NaN in the weights": (
        lambda f: edit_weights(f, lambda s: s["head.conv2.weight"].view(-1)[3:4].fill_(float("nan"))),
        r"tensor head\.conv2\.weight holds NaN or infinite values: .* fetch it again",
    ),
    "weights of another type": (
        lambda f: edit_weights(f, lambda s: s.update({"head.conv1.bias": s["head.conv1.bias"].double()})),
        r"tensor head\.conv1\.bias is torch\.float64, not the torch\.float32 of model\.toml",
    ),
    "state of a wrapper": (
        lambda f: edit_weights(f, lambda s: rename(s, lambda name: f"module._orig_mod.{name}")),
        r"named as inside a wrapper \(module\._orig_mod\..*\); store the state of the network itself",
    ),
    "state of a compiled part": (
        lambda f: edit_weights(f, lambda s: rename(s, lambda name: name.replace("head.", "head._orig_mod."))),
        r"named as inside a wrapper \(head\._orig_mod\.",
    ),
    "prefixed by something else": (
        lambda f: edit_weights(f, lambda s: rename(s, lambda name: f"model.{name}")),
        r"lacks tensor .* and \d+ more",
    ),
    "permuted weights": (
        lambda f: edit_weights(f, swap_filters),
        r"fixture\.safetensors: mean_m comes out .* more than 0.01 m",
    ),
    "another normalisation": (
        lambda f: edit_contract(f, lambda t: t["network"].update(normalisation="mixlog")),
        "comes out .* more than 0.01 m",
    ),
    "fixture not safetensors": (lambda f: (f / "fixture.safetensors").write_bytes(b"x"), "not a readable safetensors"),
    "fixture of another kind": (
        lambda f: save_file({"image": random_image(1, 3, 64, 64)}, f / "fixture.safetensors"),
        r"holds \['image'\], not",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_refused_in_one_line_naming_the_file(folder, damage, message):
    load_model(folder)  # the control: nothing is wrong before the damage
    damage(folder)
    with pytest.raises(ContractError, match=message) as caught:
        load_model(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert re.search(r"; |: ", text)


def test_a_fixture_with_nan_heights_does_not_pass(folder):
    fixture = load_file(folder / "fixture.safetensors")
    fixture["mean_m"][0, 0, 0] = float("nan")
    save_file(fixture, folder / "fixture.safetensors")
    with pytest.raises(ContractError, match="comes out nan m"):
        load_model(folder)


# --- writing -------------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_overwritten(folder):
    before = read_contract(folder)
    with pytest.raises(OutputError, match="exists"):
        write(folder, seed=1)
    assert read_contract(folder) == before
    (folder / "logs").mkdir()
    write(folder, seed=1, overwrite=True)
    assert load_model(folder).contract.weights_sha256 != before.weights_sha256
    assert (folder / "logs").is_dir(), "only the model's own files are replaced"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_texts_beside_the_model_come_and_go_with_it(tmp_path):
    folder = tmp_path / "m"
    for overwrite, figures in ((False, "1"), (True, "2")):
        save_model(
            folder, network=build(), contract=Contract(**FIELDS), card="", fixture_image=random_image(3, 64, 64),
            beside={"metrics.json": figures}, overwrite=overwrite,
        )  # fmt: skip
        assert (folder / "metrics.json").read_text() == figures
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read all
    with pytest.raises(OutputError, match="could not be written"):  # there is no folder of that name
        save_model(
            folder, network=build(), contract=Contract(**FIELDS), card="", fixture_image=random_image(3, 64, 64),
            beside={"metrics.json": "3", "no/such": ""}, overwrite=True,
        )  # fmt: skip
    assert (folder / "metrics.json").read_text() == "2"
    load_model(folder)


def test_a_folder_that_is_no_model_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not a model folder"):
        write(tmp_path / "precious", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("image", [torch.zeros(3, 50, 64, dtype=torch.uint8), torch.zeros(3, 64, 64)])
def test_a_failed_save_leaves_nothing(tmp_path, image):
    with pytest.raises(ContractError):
        save_model(tmp_path / "m", network=build(), contract=Contract(**FIELDS), card="", fixture_image=image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "weights_dtype"), [(math.nan, "float32"), (1e6, "float16")])
def test_weights_that_cannot_be_stored_are_not(tmp_path, value, weights_dtype):
    network = build()
    with torch.no_grad():
        network.head.conv2.bias[1] = value
    contract = Contract(**{**FIELDS, "weights_dtype": weights_dtype})
    with pytest.raises(
        ContractError, match=rf"tensor head\.conv2\.bias holds NaN or inf.*{weights_dtype} does not hold them"
    ):
        save_model(tmp_path / "m", network=network, contract=contract, card="", fixture_image=random_image(3, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("canopy.model.package.save_file", no_space)
    with pytest.raises(OutputError, match=r"No space left.*free space"):
        write(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_contract_of_another_network_is_refused(tmp_path):
    contract = Contract(**{**FIELDS, "network": NETWORK.model_copy(update={"head_channels": 9})})
    with pytest.raises(ContractError, match="another network"):
        save_model(tmp_path / "m", network=build(), contract=contract, card="", fixture_image=random_image(3, 64, 64))


def test_models_are_found_by_path_and_by_name(folder, monkeypatch, tmp_path):
    assert find_model(folder) == folder
    (tmp_path / "work" / "models").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "work" / "models" / "tiny-by-name")
    monkeypatch.chdir(tmp_path / "work")
    assert find_model("tiny-by-name").resolve() == (tmp_path / "work" / "models" / "tiny-by-name").resolve()
    with pytest.raises(ContractError, match=r"no model 'absent'.*tiny-by-name"):
        find_model("absent")
