"""Chat templates that tell the time, as Llama 3's do: a run tells the same whenever it goes on."""

import json
import re
from datetime import datetime
from typing import Final

_NOW: Final = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def dated(template: str, moment: datetime) -> str:
    """Return a chat template that tells this moment where it would tell the present."""
    return _NOW.sub(lambda call: json.dumps(moment.strftime(call[2])), template)
