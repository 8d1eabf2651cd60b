"""Fast-weight Transformers for fairseq (Schlag, Irie and Schmidhuber, ICML 2021).

Importing this package registers its models and tasks with fairseq and mends what ``fairseq_mends`` lists, before or
after fairseq is imported, and whether it was given as ``--user-dir`` or not. ``fwp_fairseq.ops`` needs torch only.
"""

from fwp_fairseq._registration import register_with_fairseq

__version__ = "0.1.0"

register_with_fairseq()
