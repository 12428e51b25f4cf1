"""The models that every common test runs on: one file of cases a family, merged into one table."""

from . import blip, blip2, clip, llava
from .case import Case

CASES: dict[str, Case] = {
    **clip.CASES,
    **blip.CASES,
    **{f"blip2, {name}": case for name, case in blip2.CASES.items()},
    **{f"llava, {name}": case for name, case in llava.CASES.items()},
}
