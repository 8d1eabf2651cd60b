"""The backend of flash-linear-attention where it cannot run: what it says. On a GPU: test_cuda_gpu.py."""

import pytest
import torch

from fwp_fairseq.ops import fast_weight_scan, fla


@pytest.mark.parametrize(
    "device, change, message",
    [
        ("cpu", {}, "needs tensors on a GPU, these are on cpu"),
        ("cuda", {"v": torch.rand(1, 1, 4, 2)}, "all in bfloat16 or all in float16, not torch.bfloat16, torch.float32"),
        ("cuda", {"k": torch.rand(1, 1, 4, 300).bfloat16()}, "at most 256 features, these have 300"),
        ("cuda", {"erase": None}, "erase must equal write"),
        ("cuda", {"erase": torch.rand(1, 1, 4)}, "erase must equal write"),
    ],
)
def test_what_its_kernels_do_not_have_is_named(device, change, message, monkeypatch):
    x, gate = torch.rand(1, 1, 4, 2).bfloat16(), torch.rand(1, 1, 4)
    inputs = {"q": x, "k": x, "v": x, "write": gate, "erase": gate, **change}
    inputs["q"] = inputs["k"]
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            fast_weight_scan(**inputs, backend="fla")
    else:
        on_gpu = [Elsewhere(x) for x in inputs.values()]
        with pytest.raises(ValueError, match=message):
            fla._check(*on_gpu)


class Elsewhere:
    """A tensor that says that it is on a GPU."""

    def __new__(cls, x):
        return None if x is None else super().__new__(cls)

    def __init__(self, x):
        self.x = x

    device = torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self.x, name)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    with pytest.raises(RuntimeError, match="backend is 'fla'.*pip install flash-linear-attention"):
        fla._find("delta_rule", "chunk_delta_rule")
