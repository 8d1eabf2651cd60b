"""Checks for what pip cannot require of everyone: many people have a fairseq of their own, built from source."""


def require_fairseq() -> None:
    """Say how to install fairseq if it is missing.

    Raises ImportError: no module of that name. A fairseq that is there but fails to import speaks for itself.
    """
    try:
        import fairseq  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "fairseq":
            raise
        raise ImportError(
            "fwp_fairseq needs fairseq for its models and layers: install it with "
            "`pip install 'fwp-fairseq[fairseq]'`, or from its source."
        ) from None
