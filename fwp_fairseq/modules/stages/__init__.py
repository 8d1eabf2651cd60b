"""The stages of fast-weight attention beyond its memory: one file each, registered here."""

from fwp_fairseq.modules.stages.gates import TokenGates
from fwp_fairseq.modules.stages.output_gate import OutputGate
from fwp_fairseq.modules.stages.read_layer_norm import ReadLayerNorm
from fwp_fairseq.modules.stages.short_convolution import ShortConvolution
from fwp_fairseq.modules.stages.slots import Slots
from fwp_fairseq.modules.stages.stage import Mixing, Projection, ReadOut, Sizes, Stage, Tokens

# In the order in which they act, and are made.
STAGES: tuple[type[Stage], ...] = (ShortConvolution, Slots, TokenGates, ReadLayerNorm, OutputGate)

__all__ = ["STAGES", "Mixing", "Projection", "ReadOut", "Sizes", "Slots", "Stage", "TokenGates", "Tokens"]
