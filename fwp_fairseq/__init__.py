"""Fast-weight Transformers for fairseq (Schlag, Irie and Schmidhuber, ICML 2021).

fairseq imports ``models/`` of this package when it is given as ``--user-dir``; ``fwp_fairseq.ops`` needs torch only.
"""

__version__ = "0.1.0"
