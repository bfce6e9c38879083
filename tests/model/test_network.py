"""Shapes, refusals, starting values and the equivalences the decoder relies on, with small backbones of each family."""

import copy

import pytest
import torch
from torch.nn import functional

from canopy.errors import ContractError, RecipeError
from canopy.model.distribution import Bins
from canopy.model.network import (
    PRIOR_MEAN_M,
    Fusion,
    HeightNetwork,
    NetworkConfig,
    Readout,
    prior_over_bins,
)

SMALL = {"decoder_channels": 16, "head_channels": 8, "bins": Bins(count=16)}
PVT = NetworkConfig(backbone="pvt_v2_b0", backbone_options={"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}, **SMALL)
VIT = NetworkConfig(backbone="vit_tiny_patch16_224", backbone_options={"depth": 4, "embed_dim": 48, "num_heads": 3}, **SMALL)
# At the published start of 1e-5 LayerScale hides the blocks, and a wrong network would look like a right one.
DINOV3 = NetworkConfig(
    backbone="vit_small_patch16_dinov3",
    backbone_options={"depth": 4, "embed_dim": 48, "num_heads": 3, "init_values": 0.3},
    **SMALL,
)
CHMV1 = VIT.model_copy(
    update={"tap_norm": False, "residual_bias": False, "projection_after_fusion": True, "align_corners": True}
)
NO_CLASS_TOKEN = VIT.model_copy(
    update={"backbone_options": {**VIT.backbone_options, "class_token": False, "global_pool": "avg"}}
)
SWIN = NetworkConfig(
    backbone="swin_tiny_patch4_window7_224",
    backbone_options={"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    **SMALL,
)
CONVNEXT = NetworkConfig(backbone="convnext_atto", **SMALL)
ALL = {
    "pvt": PVT, "vit": VIT, "dinov3": DINOV3, "chmv1": CHMV1, "no class": NO_CLASS_TOKEN, "swin": SWIN, "convnext": CONVNEXT,
}  # fmt: skip
each = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


def build(config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeightNetwork(config)


def image(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each
def test_logits_have_the_rows_and_columns_of_the_image(config):
    network = build(config).eval()
    with torch.no_grad():
        for rows, cols in ((32, 32), (64, 96), (160, 64)):
            assert network(image(2, 3, rows, cols)).shape == (2, 16, rows, cols)
        d = network.distribution(image(1, 3, 64, 96))
    assert d.mean_m.shape == (1, 64, 96)
    assert not d.abstain.any()


@each
def test_every_parameter_gets_a_gradient(config):
    network = build(config).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # stochastic depth may leave a branch out for all images of a batch
        (network.distribution(image(2, 3, 64, 96)).mean_m - 20).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@each
def test_the_images_of_a_batch_do_not_touch_each_other(config):
    network, x = build(config).eval(), image(3, 3, 64, 64)
    with torch.no_grad():
        together, turned = network(x), network(x[[2, 0, 1]])
        x[1] = 5.0
        other = network(x)
    assert torch.equal(together[[2, 0, 1]], turned)
    assert torch.equal(together[[0, 2]], other[[0, 2]])
    assert not torch.equal(together[1], other[1])


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 64, 72), (1, 3, 427, 427), (1, 3, 0, 32)])
def test_sides_that_are_not_multiples_of_32_are_refused(shape):
    with pytest.raises(ContractError, match="multiple of 32"):
        build(PVT)(torch.zeros(shape))


def test_a_wrong_number_of_bands_is_refused():
    with pytest.raises(ContractError, match="4 bands, the network takes 3"):
        build(PVT)(torch.zeros(1, 4, 64, 64))


def test_a_near_infrared_band_is_an_input_channel_more():
    network = build(PVT.model_copy(update={"in_channels": 4})).eval()
    assert network(image(1, 4, 32, 32)).shape == (1, 16, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vit_small_patch14_dinov2", "backbone_options": {"depth": 4}}, "patches of 14 px.*patch16"),
        ({"backbone": "pvt_v2_b9"}, "no backbone 'pvt_v2_b9'; did you mean pvt_v2_b"),
        ({"backbone_options": {"no_such_option": 1}}, "timm cannot build .* with these backbone_options"),
        ({"taps": (0, 1, 2, 3)}, "taps .* are for plain ViTs"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_options": {"depth": 4}, "taps": (0, 1, 2, 4)}, "choose from 0 to 3"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_options": {"depth": 4}, "taps": (0, 2, 1, 3)}, "ascending"),
        ({"backbone": "hiera_tiny_224", "backbone_options": {}}, "does not take windows of any size"),
        ({"backbone": "mixer_s32_224", "backbone_options": {}}, "choose"),
        ({"backbone": "xcit_nano_12_p16_224", "backbone_options": {}}, "does not take windows of any size"),
        ({"backbone": "mobilevitv2_050", "backbone_options": {}}, "but .* are needed; choose"),
        ({"backbone": "poolformer_s12", "backbone_options": {"depths": (1, 1, 1, 1)}}, "backbone_options: 'depths'"),
    ],
)
def test_a_backbone_that_cannot_work_is_refused_when_built(changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build(PVT.model_copy(update=changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_plus_patch16_dinov3_qkvb", {}),
        ("vit_large_patch16_dinov3_qkvb", {"num_reg_tokens": 2}),
        ("vit_7b_patch16_dinov3", {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_vits_by_name_take_windows_of_any_multiple_of_the_total_stride(name, options):
    small = {"depth": 4, "embed_dim": 48, "num_heads": 3, **options}
    network = build(NetworkConfig(backbone=name, backbone_options=small, **SMALL)).eval()
    with torch.no_grad():
        for side in (32, 96, 224, 416):
            logits = network(image(1, 3, side, 64))
            assert logits.shape == (1, 16, side, 64)
            assert logits.isfinite().all()


def test_the_readout_is_one_layer_over_patch_and_class():
    readout = Readout(12).eval()
    x, token = image(2, 12, 3, 5), image(2, 12, seed=2)
    weight = torch.cat([readout.patch.weight, readout.token.weight], dim=1)
    joined = torch.cat([x.permute(0, 2, 3, 1), token[:, None, None].expand(2, 3, 5, 12)], dim=-1)
    with torch.no_grad():
        expected = functional.gelu(functional.linear(joined, weight, readout.patch.bias)).permute(0, 3, 1, 2)
        torch.testing.assert_close(readout(x, token), expected)
        assert not torch.allclose(readout(x, token.flip(0)), expected), "the control: another class token"


def test_epsilon_and_periods_are_those_of_the_config():
    periods = (1.0, 5.0, 25.0, 99.0)
    plain = build(DINOV3)
    network = build(DINOV3.model_copy(update={"norm_eps": 3e-4, "rope_periods": periods}))
    eps = {m.eps for m in network.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {3e-4}
    assert network.state_dict().keys() == plain.state_dict().keys(), "they belong to the config, not to the weights"
    for changed in (network, network.to(torch.bfloat16), copy.deepcopy(network), network.float()):
        assert changed.backbone.body.rope.periods.tolist() == pytest.approx(periods)
        assert changed.backbone.body.rope.periods.dtype == torch.float32
    with torch.no_grad():
        network.load_state_dict(plain.state_dict())
        assert not torch.equal(network.eval()(image(1, 3, 64, 64)), plain.eval()(image(1, 3, 64, 64)))


def test_positions_resized_on_their_corners_keep_them():
    own = build(VIT.model_copy(update={"position_resize": "corners"})).eval()
    timms = build(VIT).eval()
    own.load_state_dict(timms.state_dict())
    body = own.backbone.body
    grid = body.pos_embed[:, 1:].unflatten(1, (14, 14))
    for rows, cols in ((16, 20), (4, 6), (26, 26)):
        resized = body._positions(rows, cols)[:, 1:].unflatten(1, (rows, cols))
        for row, col in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            torch.testing.assert_close(resized[:, row, col], grid[:, row, col], rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(own(image(1, 3, 224, 224)), timms(image(1, 3, 224, 224))), "its own size is not resized"
        assert not torch.allclose(own(image(1, 3, 64, 96)), timms(image(1, 3, 64, 96)), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DINOV3, {"rope_periods": (1.0, 2.0)}, "rope_periods has 2 periods, backbone .* takes 4"),
        (VIT, {"rope_periods": (1.0, 2.0)}, "takes 0"),
        (DINOV3, {"position_resize": "corners"}, "is for ViTs with learned positions"),
        (PVT, {"position_resize": "corners"}, "is for ViTs with learned positions"),
    ],
)
def test_settings_that_a_backbone_has_no_use_for_are_refused(config, changes, message):
    with pytest.raises(RecipeError, match=message):
        build(config.model_copy(update=changes))


def test_default_taps_end_the_quarters_of_the_depth():
    twelve = VIT.model_copy(update={"backbone_options": {"depth": 12, "embed_dim": 48, "num_heads": 3}})
    assert build(twelve).backbone.taps == [2, 5, 8, 11]


def test_the_decoder_has_the_published_sizes_of_chmv2():
    config = DINOV3.model_copy(update={"decoder_channels": 256, "head_channels": 128, "bins": Bins(count=256)})
    shapes = {name: tuple(p.shape) for name, p in build(config).named_parameters()}
    assert config.channels() == (128, 256, 512, 1024)
    assert shapes["reassemble.readout.0.patch.weight"] == shapes["reassemble.readout.0.token.weight"] == (48, 48)
    assert shapes["reassemble.resize.0.weight"] == (128, 128, 4, 4)
    assert shapes["reassemble.resize.3.weight"] == (1024, 1024, 3, 3)
    assert shapes["decoder.conv.3.weight"] == (256, 1024, 3, 3)
    assert "decoder.conv.3.bias" not in shapes
    assert "decoder.fusion.0.unit1.conv1.weight" not in shapes, "the coarsest level has nothing to add to"
    assert shapes["decoder.fusion.3.unit1.conv2.bias"] == (256,)
    assert [shapes[f"head.conv{i}.weight"] for i in (1, 2, 3)] == [(128, 256, 3, 3), (128, 128, 3, 3), (256, 128, 1, 1)]


@pytest.mark.parametrize("align_corners", [False, True])
def test_projecting_before_upsampling_equals_the_published_order(align_corners):
    fusion = Fusion(8, bias=True, align_corners=align_corners, coarsest=False)
    torch.nn.init.normal_(fusion.project.bias)
    level, coarser = image(2, 8, 6, 10), image(2, 8, 6, 10, seed=2)
    with torch.no_grad():
        x = fusion.unit2(coarser + fusion.unit1(level))
        published = fusion.project(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=align_corners))
        torch.testing.assert_close(fusion(level, coarser), published, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalisation", ["softmax", "mixlog", "linear"])
def test_an_untrained_network_predicts_low_forest(normalisation):
    config = PVT.model_copy(update={"normalisation": normalisation, "bins": Bins(count=64)})
    with torch.no_grad():
        d = build(config).eval().distribution(image(1, 3, 96, 96))
    assert not d.abstain.any()
    low, high = (3.0, 8.0) if normalisation == "softmax" else (1.0, 50.0)
    assert low < d.mean_m.mean().item() < high
    if normalisation == "softmax":
        assert d.mean_m.std().item() < 2.0


def test_the_prior_has_its_mean():
    bins = Bins(count=128)
    assert (prior_over_bins(bins) * bins.centres_m()).sum().item() == pytest.approx(PRIOR_MEAN_M, rel=0.05)


def test_a_few_steps_on_one_image_reduce_the_error():
    network, x = build(PVT).train(), image(1, 3, 64, 64)
    true = (x[:, 0].cumsum(-1).abs() / 2).clamp_max(40)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    errors = []
    for _ in range(20):
        optimiser.zero_grad()
        error = (network.distribution(x).mean_m - true).abs().mean()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
