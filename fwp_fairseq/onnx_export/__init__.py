"""Models as ONNX graphs that need neither torch nor fairseq to run (``python -m fwp_fairseq.export_onnx``).

``graph`` records what torch functions do as ONNX operators, ``operators`` says which operator each is, ``recurrence``
has the forms of the one recurrence, ``attention`` what stands for attention in a graph, ``model_graphs`` the graphs of
a model, and ``folder`` writes them down with what a program needs to know.
"""
