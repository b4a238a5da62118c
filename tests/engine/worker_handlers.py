"""What worker processes do in tests: each factory is pickled by its name."""

import os

from streamserve.errors import EngineError, InvalidParameterError


class Answer:
    """Upper case; or what the payload's first letter says."""

    def __call__(self, payload):
        match payload[:1]:
            case b"!":
                raise InvalidParameterError("not like this", param="prompt", code="bad")
            case b"#":
                raise EngineError("it cannot be done")
            case b"?":
                raise ValueError("secret")
            case b"x":
                os._exit(3)
            case b"~":
                while True:
                    pass
        return payload.upper()


class Fails:
    def __init__(self):
        os._exit(4)
