"""The kernels once, on small sizes, for compute-sanitizer: gpu.sh --all runs it."""

import torch

from fwp_fairseq.ops import fast_weight_scan, native

device = "cuda" if torch.cuda.is_available() else "cpu"
for backend in ("native", "triton") if device == "cuda" else ("native",):
    q, k = (torch.rand(2, 2, 150, 64, device=device).softmax(-1).requires_grad_() for _ in range(2))
    v = torch.randn(2, 2, 150, 64, device=device, requires_grad=True)
    g, a = (torch.rand(2, 2, 150, device=device).requires_grad_() for _ in range(2))
    fast_weight_scan(q, k, v, g, g, a, backend=backend)[0].sum().backward()
state, order = torch.rand(5, 2, 32, 16, device=device), torch.tensor([1, 1, 0, 4, 4], device=device)
q, k, v = (torch.rand(5, 2, 16, device=device) for _ in range(3))
g = torch.rand(5, 2, device=device)
places: torch.Tensor | None = torch.arange(5, device=device)
features = native.AddressFeatures("dpfp", 1, "sum")
for _ in range(3):
    places = native.step(q, k, v, g, g, None, state, None, order, places, features)[1]
if device == "cuda":
    torch.cuda.synchronize()
print("small scan and steps done")
