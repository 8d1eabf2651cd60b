"""A look inside a model: the numbers are those of the recurrence, and the page has them."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from fairseq.logging import metrics
from test_attention import CONFIGS, HEADS, READINGS, build, build_cross, build_reading, inputs, name_of
from tiny_models import build_lm, build_translation, places, save_checkpoint, tokens, translation_batch

from fwp_fairseq.inspect.__main__ import main
from fwp_fairseq.inspect.recorder import effective_rank, look, recorded
from fwp_fairseq.modules import FastWeightConfig
from fwp_fairseq.ops import Gates

SIZES = ["--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"]
SIZES += ["--decoder-attention-heads", "2"]
BOTH_SIDES = [*SIZES, *["--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-attention-heads", "2"]]


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("translation"), "translation", "fwp_transformer", *BOTH_SIDES, *places("fast-weight")
    )


def test_the_effective_rank_counts_directions_by_their_share():
    torch.testing.assert_close(effective_rank(torch.eye(5)), torch.tensor(5.0))
    torch.testing.assert_close(effective_rank(torch.ones(4, 3)), torch.tensor(1.0))
    assert effective_rank(torch.zeros(2, 3)) == 1
    assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 0.1]))) < 2


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
@torch.no_grad()
def test_what_is_seen_is_what_was_done(config):
    """The last memory is the one of all tokens, and weights are those that attention gives."""
    for reading in READINGS:
        attention = build_reading(config, reading)
        x = inputs(5, batch=1)
        with recorded(torch.nn.ModuleDict({"attention": attention})) as calls:
            _, weights = attention(x, x, value=x, need_head_weights=True)
        seen = look("attention", *calls["attention"])
        if weights is None:
            assert seen.weights is None and config.rule.max_norm is not None
        else:
            torch.testing.assert_close(seen.weights, weights[:, 0])
        tokens = attention._mix(attention._project(x, x, x), attention._kept(None, 1))
        q, k = attention.addresses(tokens)
        k, v, *gates = (None if y is None else attention.in_order(y) for y in (k, tokens.v, *attention.gates(tokens)))
        memory, _ = attention.recurrence.write(k, v, Gates(*gates))
        torch.testing.assert_close(seen.last_norm, memory[0].square().sum((1, 2)).sqrt())
        torch.testing.assert_close(seen.last_rank, effective_rank(memory[0]))
        # The last token that a head writes is the first one where it goes from right to left.
        left, right = seen.norm[: HEADS // 2, -1], seen.norm[HEADS // 2 :, 0 if attention.two_directions else -1]
        assert torch.equal(torch.cat([left, right]), seen.last_norm)
        assert seen.bound == min(memory.shape[2:]) and (seen.rank <= seen.bound + 1e-3).all()


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("targets", [4, 9])
@torch.no_grad()
def test_a_source_may_be_padded_and_its_queries_are_not(targets, slots):
    attention = build_cross(FastWeightConfig(short_convolution=3, cross_slots=slots))
    torch.nn.init.uniform_(attention.short_convolution.q, -1, 1)
    query, source = inputs(targets, batch=1), inputs(6, batch=1, seed=2)
    padding = torch.tensor([[False] * 4 + [True] * 2])
    with recorded(torch.nn.ModuleDict({"attention": attention})) as calls:
        _, weights = attention(query, source, source, padding, need_head_weights=True)
    torch.testing.assert_close(look("attention", *calls["attention"]).weights, weights[:, 0])


@torch.no_grad()
def test_a_value_that_is_written_again_was_found():
    attention = build(next(c for c in CONFIGS if name_of(c) == "delta-elu-l2"), causal=True)
    x = inputs(1, batch=1).repeat(4, 1, 1)
    seen = look("attention", attention, {"query": x, "key": x, "value": x})
    torch.testing.assert_close(seen.agreement[:, 1:], torch.ones_like(seen.agreement[:, 1:]))
    assert (seen.found.diff() > 0).all() and (seen.found[:, 0] == 0).all()
    beta = seen.write[:, 0]
    torch.testing.assert_close(seen.found[:, 2], 1 - (1 - beta) ** 2)


class Page(HTMLParser):
    """Pictures, links and targets of a page, whose elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.links: list[str] = []
        self.targets: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            kind, data = given["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(data))
        self.links += [given["href"]] if "href" in given else []
        self.targets += ["#" + given["id"]] if "id" in given else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_a_translation_has_everything_in_it(translation: Path, tmp_path: Path, capsys: Any) -> None:
    main(["--path", str(translation), "--source", "w1 w2 <b> w3 $w5", "--output", str(tmp_path / "look")])
    assert "index.html and 10 pictures" in capsys.readouterr().out
    text = (tmp_path / "look" / "index.html").read_text()
    page = Page(text)
    assert (
        page.links
        == page.targets
        == [
            f"#{name}"
            for name in (
                "encoder.layers.0.self_attn",
                *(f"decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "encoder_attn")),
            )
        ]
    )
    files = {file.read_bytes() for file in (tmp_path / "look").glob("*.png")}
    assert files == {*page.pictures} and len(files) == 10
    for picture in page.pictures:
        assert matplotlib.image.imread(io.BytesIO(picture)).std() > 0.01
    assert "w1 w2 &lt;unk&gt; w3" in text and "http" not in text


def test_a_given_translation_and_a_text_are_looked_at(translation: Path, tmp_path: Path, capsys: Any) -> None:
    main(["--path", str(translation), "--source", "w1", "--target", "w7 w8", "--output", str(tmp_path / "look")])
    assert "w7 w8 &lt;/s&gt;" in (tmp_path / "look" / "index.html").read_text()
    folder = tmp_path / "language"
    folder.mkdir()
    flags = [*SIZES, "--update-rule", "fwm", "--tokens-per-sample", "512"]
    path = save_checkpoint(folder, "language_modeling", "fwp_transformer_lm", *flags)
    main(["--path", str(path), "--source", "w1 w2 " * 150, "--output", str(tmp_path / "text")])
    assert "and 2 pictures" in capsys.readouterr().out and "fwm has none" in (tmp_path / "text/index.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--source w1 --beam 0", "--beam is 0, it must be at least 1"),
        ("--source w1 --sentencepiece-model none.model", "--sentencepiece-model is none.model, which is no file"),
        ("--source w1 --path none.pt", "none.pt"),
        (f"--source w1 --sentencepiece-model {__file__}", "which is no model of sentencepiece"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(translation: Path, arguments: str, message: str, tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["--path", str(translation), "--output", str(tmp_path / "look"), *arguments.split()])
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "look").exists()


def test_a_source_that_the_encoder_cannot_read_is_refused(translation: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="longer than the 1024 tokens of the encoder"):
        main(["--path", str(translation), "--source", "w1 " * 1100, "--output", str(tmp_path / "look")])


def test_a_model_without_memories_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "translation", "fwp_transformer", *BOTH_SIDES, *places("softmax"))
    with pytest.raises(SystemExit, match="softmax in all places: there is no memory to look into"):
        main(["--path", str(path), "--source", "w1", "--output", str(tmp_path / "look")])


def step(model: Any, batch: dict[str, Any], update: int) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Gradients of a training step, and what it logs."""
    torch.manual_seed(1)
    model.train().zero_grad()
    with metrics.aggregate(new_root=True) as logged:
        model.set_num_updates(update)
        model(**batch)[0].logsumexp(-1).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], logged.get_smoothed_values()


@pytest.mark.parametrize("flags", [[], ["--feature-map", "favor"], ["--update-rule", "gated-delta"]], ids=" ".join)
def test_a_training_logs_its_memories_every_so_many_updates_and_is_the_same(flags: list[str]) -> None:
    torch.manual_seed(0)
    model = build_translation(*places("fast-weight"), *flags, "--log-memory", "2", "--checkpoint-activations")
    batch = translation_batch(model)
    expected, nothing = step(model, batch, 1)
    found, logged = step(model, batch, 2)
    assert not nothing and all(torch.equal(a, b) for a, b in zip(found, expected))
    names = {name.rpartition(".")[0] for name in logged}
    assert names == {"encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"}
    kinds = {name.rpartition(".")[2] for name in logged}
    assert kinds == {"beta", "norm", "rank"} | ({"decay"} if "gated-delta" in flags else set())
    assert all(0 < value < 10 for value in logged.values())
    assert step(model, batch, 3)[1] == {} and step(model, batch, 4)[1].keys() == logged.keys()


def test_a_language_model_logs_its_memories_and_none_without_the_flag() -> None:
    model = build_lm("--log-memory", "1")
    assert len(step(model, {"src_tokens": tokens(model, 2, 5)}, 7)[1]) == 3
    model = build_lm()
    assert step(model, {"src_tokens": tokens(model, 2, 5)}, 0)[1] == {}
    with pytest.raises(ValueError, match="--log-memory is -1, it must be at least 0"):
        build_lm("--log-memory", "-1")
