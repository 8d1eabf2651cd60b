"""The models of the literature that REFERENCE.md names: with its flags they compute what their papers say.

The references below are the equations of Schlag, Irie and Schmidhuber (2021), one token after the other, without this
package's operators.
"""

import re
import shlex

import pytest
import torch
from conftest import ROOT
from tiny_models import build_lm, build_translation, places, tokens, translation_batch
from torch import nn

FLAGS = {
    name: shlex.split(flags)
    for name, flags in re.findall(
        r"^\| ([^|`]+?) \| `(--update-rule [^`]+)` \|",
        (ROOT / "fwp_fairseq" / "REFERENCE.md").read_text(),
        re.MULTILINE,
    )
}


def elu(x, projection):  # eq. 30
    return torch.where(x > 0, x + 1, x.exp())


def favor(x, projection):  # eq. 31-32
    rx = projection @ x
    return torch.cat([rx, -rx]).exp() * (-x.dot(x) / 2).exp() / (2 * len(rx)) ** 0.5


def dpfp(x, projection):  # eq. 37, ν = 1
    u = torch.cat([x, -x]).relu()
    return u * u.roll(1)


def sum_to_one(phi):  # eq. 29
    return lambda x, projection: phi(x, projection) / phi(x, projection).sum().clamp(min=1e-99)


def of_length_one(phi):
    return lambda x, projection: phi(x, projection) / phi(x, projection).norm()


def linear_transformer(W, z, k, v, beta, alpha):  # eq. 17-18
    return W + torch.outer(v, k), z + k


def delta_network(W, z, k, v, beta, alpha):  # eq. 22-24
    return W + beta * torch.outer(v - W @ k, k), z


def gated_delta_network(W, z, k, v, beta, alpha):
    return alpha * W + beta * torch.outer(v - alpha * W @ k, k), z


def fwm(W, z, k, v, beta, alpha):  # sec. 6.1.2
    W = W + torch.outer(beta * v + (1 - beta) * (W @ k) - W @ k, k)
    return W / max(1, W.norm()), z


def normalized(W, z, q):  # eq. 19, with 0 / 0 = 0 where DPFP of small heads has nothing in common
    return W @ q / z.dot(q).clamp(min=1e-99)


def plain(W, z, q):  # eq. 25
    return W @ q


def layer_normalized(W, z, q):
    return nn.functional.layer_norm(W @ q, (len(W),))


# Feature map, write and read of each.
MODELS = {
    "linear Transformer (Katharopoulos et al. 2020)": (elu, linear_transformer, normalized),
    "Performer (Choromanski et al. 2021)": (favor, linear_transformer, normalized),
    "DPFP": (dpfp, linear_transformer, normalized),
    "Delta Network": (sum_to_one(dpfp), delta_network, plain),
    "gated Delta Network (Yang et al. 2025)": (of_length_one(elu), gated_delta_network, plain),
    "FWM (Schlag et al. 2021)": (lambda x, projection: x.tanh(), fwm, layer_normalized),
}


class Equations(nn.Module):
    """One head after the other and one token after the other, with the projections of an attention of ours."""

    def __init__(self, attention, phi, write, read):
        super().__init__()
        self.ours, self.phi, self.write, self.read = attention, phi, write, read
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim

    def _get_input_buffer(self, incremental_state):
        return {}

    def forward(self, query, key, value, key_padding_mask=None, **kwargs):
        ours, size = self.ours, self.head_dim
        q, k, v = ours.q_proj(query), ours.k_proj(key), ours.v_proj(value)
        beta = None if ours.write_proj is None else ours.write_proj(key).sigmoid()
        alpha = None if ours.decay_proj is None else ours.decay_proj(key).sigmoid()
        read = torch.empty_like(q)
        for row in range(q.size(1)):
            for head in range(self.num_heads):
                part = slice(head * size, (head + 1) * size)
                keys, queries = (
                    [self.phi(x, ours.features.projection) for x in projected[:, row, part]] for projected in (k, q)
                )
                W, z = q.new_zeros(size, len(keys[0])), torch.zeros_like(keys[0])
                for i in range(len(keys)):
                    if key_padding_mask is None or not key_padding_mask[row, i]:
                        gates = (None if gate is None else gate[i, row, head] for gate in (beta, alpha))
                        W, z = self.write(W, z, keys[i], v[i, row, part], *gates)
                    if ours.causal:
                        read[i, row, part] = self.read(W, z, queries[i])
                if not ours.causal:
                    for i in range(len(queries)):
                        read[i, row, part] = self.read(W, z, queries[i])
        return ours.out_proj(read), None


def test_readme_names_the_models_of_the_literature():
    assert list(FLAGS) == list(MODELS)


@pytest.mark.parametrize("build", [build_lm, build_translation])
@pytest.mark.parametrize("name", MODELS)
def test_the_flags_in_readme_give_the_model_of_the_equations(name, build):
    torch.manual_seed(0)
    everywhere = places("fast-weight") if build is build_translation else []
    model = build(*everywhere, *FLAGS[name]).double().eval()
    batch = translation_batch(model) if build is build_translation else {"src_tokens": tokens(model, 2, 7)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that the memories matter, and the bound of FWM is reached
                parameter.mul_(2)
        found = model(**batch)[0]
        layers = [(layer, ("self_attn", "encoder_attn")) for layer in model.decoder.layers]
        layers += [(layer, ("self_attn",)) for layer in model.encoder.layers] if build is build_translation else []
        for layer, attentions in layers:
            for attention in attentions:
                if getattr(layer, attention) is not None:
                    setattr(layer, attention, Equations(getattr(layer, attention), *MODELS[name]))
        expected = model(**batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_models_differ():
    outputs = []
    for flags in FLAGS.values():
        torch.manual_seed(0)
        model = build_lm(*flags).eval()
        with torch.no_grad():
            outputs.append(model(tokens(model, 2, 7))[0])
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[:i])
