"""From pictures to tokens: convolutions, patches, and backbones of transformers with weights from a folder."""

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from model_cases import TINY, batch_of, tiny

import mmkern
from mmkern.model import ModelConfig, MultimodalModel
from mmkern.model.images import ImageStem

STEMS = r"image_stem: expected conv, patch, vgg16 \(11, 13, 19\) or a backbone"


def stem(**changes) -> ImageStem:
    torch.manual_seed(0)
    return ImageStem(replace(TINY, **changes)).eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A folder with a tiny ResNet as transformers saves it, and that network."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("resnet")
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    network = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    network.save_pretrained(folder)
    return str(folder), network


def test_patches_are_cut_and_projected():
    module, images = stem(image_stem="patch", patch_size=8), torch.rand(2, 3, 32, 32)
    normal = (images - 0.5) / 0.25
    for row in range(4):
        for column in range(4):
            patch = normal[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
            expected = patch @ module.features.weight.flatten(1).T + module.features.bias
            torch.testing.assert_close(module(images)[:, row, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "grid"), [(72, 5), (64, 4), (32, 2), (7, 1)])
def test_convolutions_and_pooling_see_where_things_are(side, grid):
    module = stem(image_size=side)
    images = torch.full((1, 3, side, side), 0.5)
    features = module(images)
    assert features.shape == (1, grid, grid, 16)
    images[..., : side // 8 + 1, : side // 8 + 1] = 1.0  # a spot in the upper left corner
    moved = (module(images) - features).abs().amax(-1)[0]
    assert moved[0, 0] == moved.max() > 0.01


def test_pictures_get_two_dimensional_positions():
    model, images = tiny().eval(), torch.rand(1, 3, 32, 32)
    expected = mmkern.add_positional_encoding(model.stem(images), "sincos2d").flatten(1, 2) + model.modality[0]
    torch.testing.assert_close(model._see(images, None), expected)
    plain = tiny(encoding="none").eval()
    torch.testing.assert_close(plain._see(images, None), plain.stem(images).flatten(1, 2) + plain.modality[0])


def test_a_backbone_with_its_weights(resnet):
    folder, network = resnet
    module, images = stem(image_stem="resnet", image_weights=folder), torch.rand(2, 3, 32, 32)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    features = network(normal).last_hidden_state  # (2, 8, height, width)
    projection = module.features.projection
    expected = torch.einsum("bchw,dc->bhwd", features, projection.weight[..., 0, 0]) + projection.bias
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_normalised_without_a_buffer(resnet):
    """Meta construction, `to_empty` and a strict load leave no constant undefined, and bfloat16 rounds none."""
    for changes in ({"image_stem": "conv"}, {"image_stem": "resnet", "image_backbone": resnet[1].config.to_dict()}):
        model, images = tiny(**changes).eval(), torch.rand(2, 3, 32, 32)
        with torch.device("meta"):
            again = MultimodalModel(replace(TINY, **changes)).eval()
        again.to_empty(device="cpu")
        for t in (*again.parameters(), *again.buffers()):
            t.data.fill_(torch.nan if t.is_floating_point() else 7)
        again.load_state_dict(model.state_dict())
        assert not dict(again.named_buffers()).keys() - again.state_dict().keys()
        assert torch.equal(again._see(images, None), model._see(images, None))
    module = model.stem
    module.features = torch.nn.Identity()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    for dtype, rounding in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        given = images.to(dtype)
        expected = (given.double().permute(0, 2, 3, 1) - mean) / deviation
        found = module.to(dtype)(given).double()
        assert ((found - expected).abs() <= rounding * (expected.abs() + 2**-15 * 8)).all(), dtype


def test_a_model_with_a_backbone_trains_and_comes_back_without_the_folder(resnet):
    model, batch = tiny(image_stem="resnet", image_weights=resnet[0]), batch_of()
    before = [p.detach().clone() for p in model.stem.parameters()]
    sum(model.loss(batch).values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any(not torch.equal(p, old) for p, old in zip(model.stem.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    saved = json.loads(json.dumps(asdict(model.config)))
    again = MultimodalModel(ModelConfig(**{**saved, "image_weights": "/nowhere"}))
    again.load_state_dict(model.state_dict())
    for name, expected in model.eval()(batch).items():
        torch.testing.assert_close(again.eval()(batch)[name], expected)


def test_a_backbone_from_its_own_configuration():
    pytest.importorskip("transformers")
    settings = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    module = stem(image_stem="resnet", image_backbone=settings)
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 4, 4, 16)
    assert module.backbone["hidden_sizes"] == [4, 8]


def test_batch_norm_of_a_backbone_sees_only_pictures_that_are_there(resnet):
    model, batch = tiny(image_stem="resnet", image_weights=resnet[0]), batch_of()
    there = batch.image_present
    together = model._see(batch.images, there)
    torch.testing.assert_close(together[there], model._see(batch.images[there], None))
    assert not together[~there].any()


@pytest.mark.parametrize("image_stem", ["conv", "patch"])
def test_a_batch_without_any_picture_trains(image_stem):
    model, batch = tiny(image_stem=image_stem), batch_of()
    losses = model.loss(replace(batch, image_present=torch.zeros(4, dtype=torch.bool)))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    without = model.loss(replace(batch, images=None, image_present=None))
    for name, expected in without.items():
        torch.testing.assert_close(losses[name], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_stem": "patch", "patch_size": 12}, "patch_size: expected a divisor of image_size = 32, got 12"),
        ({"image_stem": "resnet", "image_weights": "/nowhere"}, "image_weights: expected a folder .* '/nowhere'"),
        ({"image_stem": "no-such-network"}, STEMS + r" .* 'no-such-network'"),
        ({"image_stem": "resnet", "image_backbone": {"depths": "x"}}, STEMS),
        ({"image_stem": "gpt2"}, STEMS + " of transformers, got 'gpt2'"),
    ],
)
def test_wrong_stems_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        stem(**changes)


def test_weights_of_another_network_are_refused(resnet):
    with pytest.raises(ValueError, match="image_stem: 'convnext', but image_weights hold 'resnet'"):
        stem(image_stem="convnext", image_weights=resnet[0])


def test_weights_are_neither_unpickled_nor_waited_for(resnet, tmp_path):
    folder = shutil.copytree(resnet[0], tmp_path / "resnet")
    torch.save(resnet[1].state_dict(), folder / "pytorch_model.bin")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        stem(image_stem="resnet", image_weights=str(folder))
    os.mkfifo(weights)
    with pytest.raises(ValueError, match=r"image_weights: .*model.safetensors is no regular file"):
        stem(image_stem="resnet", image_weights=str(folder))


TORCHVISION = {  # where its vgg16 has convolutions in `features`, and their shapes; vgg11_bn has norms between
    "vgg16": {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
              17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
    "vgg11_bn": {0: (64, 3), 4: (128, 64), 8: (256, 128), 11: (256, 256), 15: (512, 256), 18: (512, 512),
                 22: (512, 512), 25: (512, 512)},
}  # fmt: skip


def published(name):
    """Weights named and shaped as in torchvision's file; of the classifier, which nobody reads, a few."""
    draw = torch.Generator().manual_seed(0)
    found = {"classifier.6.bias": torch.zeros(1000)}
    for place, (out, into) in TORCHVISION[name].items():
        found[f"features.{place}.weight"] = torch.randn(out, into, 3, 3, generator=draw) * (2 / into / 9) ** 0.5
        found[f"features.{place}.bias"] = torch.randn(out, generator=draw) * 0.1
        if name.endswith("_bn"):
            norm = {"weight": 1.5, "bias": 0.1, "running_mean": 0.2, "running_var": 0.5}
            found |= {f"features.{place + 1}.{key}": torch.full((out,), value) for key, value in norm.items()}
            found[f"features.{place + 1}.num_batches_tracked"] = torch.tensor(7)
    return found


def by_hand(tensors, name, x):
    """What torchvision's definition computes of them: pooling where the next convolution's place leaves a gap."""
    places = list(TORCHVISION[name])
    step = 3 if name.endswith("_bn") else 2
    for place, after in zip(places, [*places[1:], -1], strict=True):
        x = F.conv2d(x, tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"], padding=1)
        if step == 3:
            mean, var, weight, bias = (
                tensors[f"features.{place + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, mean, var, weight, bias)
        x = F.relu(x)
        if after != place + step:
            x = F.max_pool2d(x, 2)
    return x


@pytest.mark.parametrize(("name", "suffix"), [("vgg16", ".pth"), ("vgg11_bn", ".safetensors")])
def test_vgg_with_weights_in_torchvisions_layout(tmp_path, name, suffix):
    tensors, path = published(name), tmp_path / f"{name}{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else safetensors.torch.save_file(tensors, path)
    module, images = stem(image_stem=name, image_weights=str(path)), torch.rand(1, 3, 32, 32)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = module.features[1](by_hand(tensors, name, (images - mean) / deviation)).permute(0, 2, 3, 1)
    assert expected.shape == (1, 1, 1, 16)
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)
    path.unlink()  # a checkpoint of the model holds the weights
    config = replace(TINY, image_stem=name, image_weights=str(path), image_backbone=module.backbone)
    assert ImageStem(config).backbone == {"model_type": name}


def test_vgg_weights_that_are_none(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    wrong = {"a.pth": {"features.0.weight": Trap()}, "b.pth": {"features.0.weight": torch.zeros(3)}, "c.pth": [1]}
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "d.safetensors").write_bytes(b"no tensors")
    os.mkfifo(tmp_path / "e.pth")
    for name in (*wrong, "d.safetensors", "e.pth", "missing.pth"):
        with pytest.raises(ValueError, match=rf"^image_weights: .*{name}") as caught:
            stem(image_stem="vgg11", image_weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()
