"""bsfa as an attention backend of vLLM, without a changed file: ``vllm serve MODEL --attention-backend CUSTOM``.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in each of its
processes. docs/integrations_vllm.md is the manual.
"""

from __future__ import annotations

import logging
from typing import Any

#: The backend's own name, where vLLM takes new names; elsewhere it is CUSTOM only.
NAME = "BSFA"

_BACKENDS = f"{__name__}.backend"
#: Below vLLM's own logger, whose handlers and level people have set.
logger = logging.getLogger("vllm.bsfa")


def register() -> None:
    """Tell vLLM about the backend: as CUSTOM, and as BSFA if it knows backends by new names. Harmless when repeated.

    Imports nothing of the backend, so that a vLLM that does not use it starts as before. A CUSTOM backend of another
    package stays, with a warning.
    """
    from vllm.v1.attention.backends import registry

    backends = registry.AttentionBackendEnum
    named = hasattr(backends, "register")
    if named:
        path = f"{_BACKENDS}.BsfaBackend"
        registry.register_backend(backends[NAME] if NAME in backends.__members__ else NAME, path)
        # Members are pickled by value, which a process that vLLM spawns does not know before it has loaded plug-ins;
        # but it gets its configuration first.
        backends[NAME].__reduce_ex__ = lambda protocol: (_named_backend, ())
    custom = f"{_BACKENDS}.CustomBackend"
    other = backends.CUSTOM.get_path() if backends.CUSTOM.is_overridden() else custom
    if other == custom:
        registry.register_backend(backends.CUSTOM, custom)
    else:
        remedy = f"select bsfa by --attention-backend {NAME}" if named else "leave that plug-in out with VLLM_PLUGINS"
        logger.warning("bsfa: the backend CUSTOM is %s already: %s", other, remedy)


def _named_backend() -> Any:
    """The member BSFA of vLLM's backends, in a process that may not know it yet."""
    from vllm.v1.attention.backends import registry

    register()
    return registry.AttentionBackendEnum[NAME]
