"""What the subscribers of the tests have in common: they write down each event, and answer by its text."""

import json
import os
import threading

TOPIC = 'orders'
DEAD = 'orders.dead'
_lock = threading.Lock()
_seen = {}


def note(**entry):
    """Adds a line to the log that the test reads."""
    with _lock, open(os.environ['TEST_LOG'], 'a', encoding='utf-8') as log:
        log.write(json.dumps(entry) + '\n')


def verdict(topic, data, **more):
    """'success', 'retry' (the first time) or 'drop', as the event's text asks for."""
    note(topic=topic, data=data, **more)
    with _lock:
        _seen[data] = _seen.get(data, 0) + 1
        times = _seen[data]
    if topic == DEAD:
        return 'success'
    if data == 'retry' and times == 1:
        return 'retry'
    return 'drop' if data == 'drop' else 'success'
