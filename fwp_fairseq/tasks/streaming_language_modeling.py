"""Language modelling without truncation of the context (sec. 6.3, table 4): the corpus as parallel streams.

``--batch-size`` streams in every process are read in segments of ``--tokens-per-sample`` tokens, in their order. What
the model keeps of the earlier ones goes on from segment to segment, in training, validation and evaluation; gradients
end at the borders. An epoch begins with nothing. Checkpoints have what is carried, of all processes, so that training
resumes where it was.

The model says what it carries: it has ``cannot_carry_state``, and its decoder ``carry``
(``fwp_fairseq.modules.carried_state``).
"""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import FairseqLanguageModel
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import II
from torch import Tensor

from fwp_fairseq.modules.carried_state import DecoderState
from fwp_fairseq.tasks.token_streams import StreamsIterator, TokenStreams

# fairseq wants a number for the longest text.
NO_LIMIT = 10**9


@dataclass
class StreamingLanguageModelingConfig(FairseqDataclass):
    """Options of the task; what language_modeling has beyond them makes no sense for streams."""

    data: Optional[str] = field(default=None, metadata={"help": "path to data directory"})
    tokens_per_sample: int = field(
        default=256, metadata={"help": "tokens of a segment: how far gradients go back, and what is read at once"}
    )
    output_dictionary_size: int = field(default=-1, metadata={"help": "limit the size of output dictionary"})
    # Models ask for these two.
    max_target_positions: Optional[int] = field(
        default=None, metadata={"help": "longest continuation in generation (default: no limit)"}
    )
    add_bos_token: bool = field(default=False, metadata={"help": "not for streams: they begin once"})
    seed: int = II("common.seed")
    dataset_impl: Optional[ChoiceEnum(get_available_dataset_impl())] = II(  # type: ignore[valid-type]
        "dataset.dataset_impl"
    )


class CarriedState:
    """What a model keeps of the segments so far, ``layers``, and which segment comes next."""

    def __init__(self) -> None:
        self.position: dict[str, int] = {}
        self.next_segment = 0
        self.layers: Optional[DecoderState] = None
        # By --amp, an update is repeated when its gradients overflow: the states before its segments.
        self._of_update: dict[int, Optional[DecoderState]] = {}
        self._update = -1

    def before(self, sample: dict[str, Any], update: Optional[int] = None) -> Optional[DecoderState]:
        """What the model has read before this segment; None at the start of the streams.

        Raises RuntimeError if it is not the next segment. ``update`` is the number of the update, if it can come again.
        """
        self.position = sample["position"]
        segment = self.position["segment"]
        if update is not None:
            if update != self._update:
                self._update, self._of_update = update, {}
            if segment in self._of_update:
                self.next_segment, self.layers = segment, self._of_update[segment]
        if segment == 0:
            self.layers = None
        elif segment != self.next_segment:
            carried = f"what segment {self.next_segment - 1} left" if self.next_segment else "nothing"
            raise RuntimeError(
                f"segment {segment} comes after {carried} was carried, but segments must come in their order"
            )
        if update is not None:
            self._of_update[segment] = self.layers
        return self.layers

    def after(self, layers: DecoderState) -> None:
        """Take what the model left when it had read the segment that ``before`` was asked about."""
        self.layers = layers
        self.next_segment = self.position["segment"] + 1

    def within_epoch(self) -> bool:
        return 0 < self.next_segment < self.position.get("segments", 0)


@register_task("streaming_language_modeling", dataclass=StreamingLanguageModelingConfig)
class StreamingLanguageModelingTask(LanguageModelingTask):
    """Language modelling with a state that goes on from segment to segment."""

    def __init__(self, args: Any, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(args, *arguments, **kwargs)
        if args.tokens_per_sample < 1:
            raise ValueError(f"--tokens-per-sample is {args.tokens_per_sample}, it must be at least 1")
        if args.add_bos_token:
            raise ValueError("--add-bos-token is not for --task streaming_language_modeling: segments go on")
        self.training = CarriedState()
        self.validation = CarriedState()
        # Of each model of an ensemble, by --score-reference.
        self.scoring: defaultdict[int, CarriedState] = defaultdict(CarriedState)
        self._restored: Optional[dict[str, Any]] = None
        self._gathered: Optional[dict[str, Any]] = None

    # --- Models and data ---------------------------------------------------------------------------------------------

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        """Raises ValueError, saying which flag is in the way, if the model's state cannot be carried."""
        # Not language_modeling's, which asks translation models for what they do not have.
        model = super(LanguageModelingTask, self).build_model(args, from_checkpoint)
        is_language_model = isinstance(model, FairseqLanguageModel)
        if is_language_model and hasattr(model, "cannot_carry_state"):
            reason = model.cannot_carry_state()
        else:
            reason = (
                f"{type(model).__name__} carries nothing from segment to segment: allowed are the architectures "
                "fwp_transformer_lm*, with fast weights, and transformer_xl*"
            )
        if reason is not None:
            if from_checkpoint:
                command = "fairseq-eval-lm" if is_language_model else "fairseq-generate"
                reason += f". The checkpoint was trained otherwise: use {command}, with the --task of its training"
            raise ValueError(f"--task streaming_language_modeling: {reason}")
        # Models are built for the length of blocks: what has positions must be small enough to be refused.
        model.decoder.max_target_positions = self.args.max_target_positions or NO_LIMIT
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """A split of binarised data, as one stream. Of several data folders each epoch has the next."""
        paths = utils.split_paths(self.args.data)
        path = f"{paths[(epoch - 1) % len(paths)]}/{split}"
        lines = data_utils.load_indexed_dataset(path, self.dictionary, self.args.dataset_impl, combine=combine)
        if lines is None:
            raise FileNotFoundError(f"Dataset not found: {split} ({path})")
        if not lines.sizes.any():
            raise ValueError(f"{path} has no tokens")
        self.datasets[split] = TokenStreams(lines, self.args.tokens_per_sample, self.dictionary, self.output_dictionary)

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        **kwargs: Any,
    ) -> Any:
        """Segments in their order, and in each batch the streams of one process.

        Raises ValueError unless the number of streams is given, and is not above that of tokens.
        """
        if not isinstance(dataset, TokenStreams):
            return super().get_batch_iterator(dataset, max_tokens, max_sentences, **kwargs)
        if max_sentences is None or max_sentences < 1:
            raise ValueError(f"--batch-size is {max_sentences}, it must be the number of streams of each process")
        if max_tokens is not None:
            raise ValueError(
                f"--max-tokens is {max_tokens}: leave it out, a batch has --batch-size segments of --tokens-per-sample"
            )
        processes = kwargs.get("num_shards", 1)
        streams = dataset.in_streams(max_sentences * processes)
        if streams.streams > streams.tokens:
            raise ValueError(
                f"--batch-size is {max_sentences} in {processes} process(es), but the text has only {streams.tokens} "
                "tokens: allowed is at most one stream a token"
            )
        return StreamsIterator(
            dataset=streams,
            collate_fn=streams.collater,
            batch_sampler=streams.batches(processes),
            num_shards=processes,
            shard_id=kwargs.get("shard_id", 0),
            num_workers=kwargs.get("num_workers", 0),
            epoch=kwargs.get("epoch", 1),
            buffer_size=kwargs.get("data_buffer_size", 0),
            disable_shuffling=True,
            skip_remainder_batch=kwargs.get("skip_remainder_batch", False),
        )

    def eval_lm_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "fairseq-eval-lm does not carry a state: python -m fwp_fairseq.eval_lm does, with the same options"
        )

    # --- Steps -------------------------------------------------------------------------------------------------------

    def train_step(
        self, sample: dict[str, Any], model: Any, criterion: Any, optimizer: Any, update_num: int, *args: Any, **kw: Any
    ) -> Any:
        if self._restored is not None:
            self._restore(sample)
        before = self.training.before(sample, update_num if isinstance(optimizer, AMPOptimizer) else None)
        # The backward pass is in the context, too: --checkpoint-activations reads the segment again in it.
        with model.decoder.carry(before) as after:
            result = super().train_step(sample, model, criterion, optimizer, update_num, *args, **kw)
        self.training.after(after)
        return result

    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> Any:
        with model.decoder.carry(self.validation.before(sample)) as after:
            result = super().valid_step(sample, model, criterion)
        self.validation.after(after)
        return result

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def before_checkpoint(self) -> None:
        """Bring what all processes carry to the first one (``fairseq_mends.every_process_saves`` calls it on each)."""
        self._gathered = None
        if self.training.layers is None or not self.training.within_epoch():
            return
        shares = _gather(_to(self.training.layers, "cpu"))
        if shares is None:
            return
        self._gathered = {
            "next_segment": self.training.next_segment,
            "layers": [
                {name: torch.cat([layer[name] for layer in layers]) for name in layers[0]} for layers in zip(*shares)
            ],
        }

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """fairseq puts this into the checkpoint. At the end of an epoch there is nothing that goes on."""
        return {} if self._gathered is None else {type(self).__name__: self._gathered}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """fairseq calls this, on every process, with what a checkpoint of the middle of an epoch has."""
        self._restored = state

    def _restore(self, sample: dict[str, Any]) -> None:
        """Take the streams of this process from a checkpoint, which may have had them in other processes."""
        assert self._restored is not None
        first, target = sample["position"]["first_stream"], sample["target"]
        mine = slice(first, first + target.size(0))
        layers = [{name: x[mine].clone() for name, x in layer.items()} for layer in self._restored["layers"]]
        self.training.layers = _to(layers, target.device)
        self.training.next_segment = self._restored["next_segment"]
        self._restored = None

    # --- Generation --------------------------------------------------------------------------------------------------

    def inference_step(
        self,
        generator: Any,
        models: list[Any],
        sample: dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Any = None,
    ) -> list[list[dict[str, Tensor]]]:
        """Continue each prompt of the batch: read it in segments, then search from the state that this leaves.

        The hypotheses have the prompt in front, as those of language_modeling. Lengths (--max-len-a, --max-len-b,
        --min-len) and scores are of what comes after it, with a source of one word.
        """
        if constraints is not None:
            raise NotImplementedError("--constraints is not for --task streaming_language_modeling")
        if isinstance(generator, SequenceScorer):
            return self._score(generator, models, sample)
        prompts = sample["net_input"]["src_tokens"] if prefix_tokens is None else prefix_tokens
        results = []
        for prompt in prompts:
            prompt = utils.strip_pad(prompt, self.source_dictionary.pad())[None]
            with ExitStack() as stack:
                for model in models:
                    state = read_text(model, prompt[:, :-1], self.args.tokens_per_sample)
                    stack.enter_context(model.decoder.carry(state))
                last = {"net_input": {"src_tokens": prompt[:, -1:], "src_lengths": prompt.new_ones(1)}}
                (hypotheses,) = generator.generate(models, last, bos_token=int(prompt[0, -1]))
            for hypothesis in hypotheses:
                hypothesis["tokens"] = torch.cat([prompt[0, 1:].to(hypothesis["tokens"]), hypothesis["tokens"]])
            results.append(hypotheses)
        return results

    def _score(
        self, scorer: SequenceScorer, models: list[Any], sample: dict[str, Any]
    ) -> list[list[dict[str, Tensor]]]:
        """Score the words of sentences, or of the next segment of streams: there, what precedes it is known."""
        if "position" not in sample:
            return scorer.generate(models, sample)
        with ExitStack() as stack:
            left = [
                stack.enter_context(model.decoder.carry(self.scoring[number].before(sample)))
                for number, model in enumerate(models)
            ]
            hypotheses = scorer.generate(models, sample)
        for number, layers in enumerate(left):
            self.scoring[number].after(layers)
        return hypotheses


@torch.no_grad()
def read_text(model: Any, tokens: Tensor, segment_length: int) -> Optional[DecoderState]:
    """What ``model`` carries after (rows, length) tokens, which it reads in segments; None if there are none."""
    model.eval()
    state: Optional[DecoderState] = None
    for segment in tokens.split(segment_length, dim=1) if tokens.size(1) else ():
        with model.decoder.carry(state) as left:
            model.decoder.extract_features(segment, encoder_out=None)
        state = left
    return state


def _to(layers: DecoderState, device: Any) -> DecoderState:
    return [{name: x.to(device) for name, x in layer.items()} for layer in layers]


def _gather(layers: DecoderState) -> Optional[list[DecoderState]]:
    """The layers of all processes, in their order, on the first one; None on the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [layers]
    first = torch.distributed.get_rank() == 0
    shares: Optional[list[Any]] = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(layers, shares)
    return shares
