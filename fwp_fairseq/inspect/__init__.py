"""A look inside: what a model writes into its memories for one sentence or text, and how it reads them.

python -m fwp_fairseq.inspect --path checkpoint_best.pt --source "..." --output DIR
"""
