"""The transformer, and its weights from an ONNX file written here."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from superlora.demo.supernet import fuse  # noqa: E402
from superlora.demo.vit import VisionTransformer, load_onnx  # noqa: E402

LINEAR_LAYERS = {
    "query": "attention/attention/query",
    "key": "attention/attention/key",
    "value": "attention/attention/value",
    "proj": "attention/output/dense",
    "fc1": "mlp/fc1",
    "fc2": "mlp/fc2",
}
"""Linear layers of a block: our name, and where the exporter's graph has them."""

SIZES = {"width": 8, "depth": 2, "heads": 2, "hidden": 12, "patch": 2, "grid": 3}


def exported(model: VisionTransformer, leave_out: str = "") -> bytes:
    """Return an ONNX file with the names and the transposed weights of a real export."""
    initializers, nodes = [], []

    def store(name: str, tensor: torch.Tensor) -> None:
        if name != leave_out:
            initializers.append(onnx.numpy_helper.from_array(tensor.detach().numpy(), name))

    def anonymous(kind: str, place: str, tensor: torch.Tensor) -> None:
        name = f"onnx::{kind}_{100 + len(nodes)}"
        store(name, tensor)
        inputs = [name, "x"] if kind == "Concat" else ["x", name]
        nodes.append(
            onnx.helper.make_node(kind, inputs, [f"y{len(nodes)}"], f"/backbone/{place}/{kind}")
        )

    store("backbone.embeddings.patch_embeddings.projection.weight", model.patch.weight)
    store("backbone.embeddings.patch_embeddings.projection.bias", model.patch.bias)
    store("backbone.embeddings.cls_token", model.class_token)
    store("backbone.layernorm.weight", model.norm.weight)
    store("backbone.layernorm.bias", model.norm.bias)
    store("decoder.bias", torch.zeros(3))
    anonymous("Reshape", "embeddings", model.patch_position)
    anonymous("Concat", "embeddings", model.class_position)
    for index, block in enumerate(model.blocks):
        layer = f"backbone.encoder.layer.{index}"
        for side in (1, 2):
            norm = getattr(block, f"norm{side}")
            store(f"{layer}.norm{side}.weight", norm.weight)
            store(f"{layer}.norm{side}.bias", norm.bias)
            store(f"{layer}.layer_scale{side}.lambda1", getattr(block, f"scale{side}"))
        for name, place in LINEAR_LAYERS.items():
            linear = getattr(block, name)
            store(f"{layer}.{place.replace('/', '.')}.bias", linear.bias)
            anonymous("MatMul", f"encoder/layer.{index}/{place}", linear.weight.t().contiguous())
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initializers)
    return bytes(onnx.helper.make_model(graph).SerializeToString())


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


def test_the_file_gives_the_model_back(model: VisionTransformer) -> None:
    loaded = load_onnx(exported(model), heads=2)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(3, 3, 8, 6)
    torch.testing.assert_close(loaded(images), model(images))


def test_a_missing_weight_is_named(model: VisionTransformer) -> None:
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        load_onnx(exported(model, leave_out="backbone.layernorm.bias"), heads=2)


def test_one_feature_vector_an_image_from_all_its_patches(model: VisionTransformer) -> None:
    images = torch.randn(2, 3, 8, 6)
    features = model(images)
    assert features.shape == (2, SIZES["width"])
    changed = images.clone()
    changed[0, :, -1, -1] += 1
    moved = (model(changed) - features).abs().amax(1)
    assert moved[0] > 0
    assert moved[1] == 0


def test_positions_at_the_stored_grid_are_the_stored_ones(model: VisionTransformer) -> None:
    torch.testing.assert_close(model.positions(3, 3), model.patch_position)
    assert model.positions(2, 5).shape == (1, 10, SIZES["width"])


def test_fusing_joins_the_weights_and_leaves_the_outputs(model: VisionTransformer) -> None:
    base = model.double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fused = fuse(base)
    images = torch.randn(3, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(images), base(images), rtol=1e-12, atol=1e-12)
    names = [
        name.rpartition(".")[2]
        for name, module in fused.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert names == ["qkv", "proj", "fc1", "fc2"] * 2
    assert not fused.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
