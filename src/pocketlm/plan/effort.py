"""How much work a search does, and about how long that takes here."""

from dataclasses import dataclass

from pocketlm.errors import BadInputError
from pocketlm.plan.pace import Pace

# In forward passes of one window in float32, timed on SmolLM2-135M on two cores with AVX2: every format's damage in
# every block, the damage of pruning, choosing codes, of each candidate what is neither learning nor codes (pruning,
# reading it), and the proof at the end, most of which is the engine reading text.
FORMATS_PASSES, PRUNING_PASSES, CODES_PASSES, CANDIDATE_PASSES, PROOF_PASSES = 280, 120, 220, 140, 400
# In passes as models are read, in bfloat16 where the machine multiplies that. Of each window that codes are chosen
# from: three for what its tokens matter, then the original's, before the codes and behind them.
STATISTICS_PASSES = 6


@dataclass(frozen=True)
class Effort:
    """What a search may do.

    Attributes:
        candidates: Plans that are built and measured; 1 takes what is expected to be best.
        trial_tokens: That each of them learns from before it is measured.
        tokens: That the winner learns from.
        tunes: Whether what was quantized is tuned, where pruning was allowed: scales and norms (codes too where these
            are many) learn from half of the tokens, or from all where all weights would learn nothing.
        mixes: Of formats that are made and measured at most, before one is taken.
        windows: Of calibration text, for the statistics of quantizing.
        trial_windows: The same while several candidates are tried.
    """

    candidates: int
    trial_tokens: int
    tokens: int
    tunes: bool = True
    mixes: int = 1
    windows: int = 64
    trial_windows: int = 32


PRESETS = {
    "fast": Effort(candidates=1, trial_tokens=0, tokens=12_288, tunes=False, windows=32),
    "balanced": Effort(candidates=3, trial_tokens=12_288, tokens=49_152),
    "best": Effort(candidates=6, trial_tokens=24_576, tokens=1_048_576, mixes=2),
}
PRESET = "balanced"  # where none is given


def effort_of(preset: str | None) -> Effort:
    """Return what a preset does; what PRESET does where it is None.

    Raises:
        BadInputError: There is no such preset.
    """
    preset = PRESET if preset is None else preset
    if preset not in PRESETS:
        raise BadInputError(f"Unknown preset `{preset}`. Known: {', '.join(PRESETS)}")
    return PRESETS[preset]


def expected_seconds(effort: Effort, pace: Pace, prunes: bool, known: bool, learns: bool = True) -> float:
    """Return about how long a whole run takes, to some tens of percent.

    Args:
        effort: What it does.
        pace: Of this machine.
        prunes: Whether something will be pruned; else there is one candidate.
        known: Whether the damages were measured by an earlier run.
        learns: Whether a plan that prunes nothing may learn, if the effort says so.
    """
    candidates = effort.candidates if prunes else 1
    passes = PROOF_PASSES + (0 if known else FORMATS_PASSES + PRUNING_PASSES * prunes)
    learnt = effort.tokens if prunes or (effort.tunes and learns) else 0
    codes = codes_seconds(effort.windows, pace)
    each = codes_seconds(effort.trial_windows, pace) if candidates > 1 else codes
    if candidates > 1:
        passes += candidates * CANDIDATE_PASSES
        codes += candidates * each
        learnt += candidates * effort.trial_tokens
    return pace.plain * passes + codes + (effort.mixes - 1) * each + pace.learning(learnt)


def codes_seconds(windows: int, pace: Pace) -> float:
    """Return about how long choosing the codes of a mix takes, from so many windows of text."""
    return pace.plain * CODES_PASSES + pace.fast * STATISTICS_PASSES * windows


def trial_tokens_within(seconds: float, tokens: int, pace: Pace, chooses: bool) -> int:
    """Return from how many tokens the first candidate may learn, if its file is to be proven in a time: some or none.

    Args:
        seconds: The time.
        tokens: As many at most.
        pace: Of this machine.
        chooses: Whether its codes are still to be chosen.
    """
    spare = seconds - pace.plain * (PROOF_PASSES + CANDIDATE_PASSES + CODES_PASSES * chooses)
    return next((tokens // share for share in (1, 2, 4) if pace.learning(tokens // share) <= spare), 0)
