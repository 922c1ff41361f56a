"""Whether engines ask for the run's key, tried before a run relies on it."""

from __future__ import annotations

import urllib.error
import urllib.request

from megatron_rl.config.rollout import EngineConfig
from megatron_rl.rollout.engine_command import engine_key

TIMEOUT_S = 10.0
REFUSED = (401, 403)


def check_keys(engine: EngineConfig) -> None:
    """ValueError for an engine of `urls` that answers without the key, or refuses it. One that is down is left out."""
    key = engine_key(engine)
    for url in engine.urls:
        without, with_key = status_of(url, None), status_of(url, key)
        if without is not None and without not in REFUSED:
            raise ValueError(f"rollout.engine.urls: {url} answers without a key (HTTP {without}), so any user who "
                             "reaches it could give it other weights: start it with --api-key and put that key into "
                             f"the environment variable {engine.api_key_env}")
        if with_key in REFUSED:
            raise ValueError(f"rollout.engine.urls: {url} refuses the key in the environment variable "
                             f"{engine.api_key_env} (HTTP {with_key}): it must be the one of its --api-key")


def status_of(url: str, key: str | None) -> int | None:
    """The HTTP status of its /model_info, None without an answer. No proxy of the environment is used."""
    request = urllib.request.Request(f"{url.rstrip('/')}/model_info",
                                     headers={} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
