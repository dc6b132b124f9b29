"""What one generation cost, in the vocabulary of speculative decoding whatever the strategy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Counts and times of one generation; times in seconds.

    Attributes:
        strategy: Its name.
        prompt_tokens: Tokens of the prompt.
        reused_tokens: Those of them the cache already held.
        new_tokens: Tokens generated, a final end-of-sequence token included.
        rounds: Forward passes that gave tokens; the last one over the prompt is the first of them.
        steps: Histogram: tokens a round gave -> rounds.
        proposed_at_depth: Draft tokens judged, by their depth: the first is the one behind a round's own token.
            `dynamo` judges its further heads' tokens by confidence, `speculative` by the first head.
        accepted_at_depth: Those of them that became text.
        proposed_by: Draft tokens judged, by the name of their drafter where it has one.
        accepted_by: Those of them that became text.
        ttft_s: From the call to the first token.
        total_s: From the call to the end.
        ort_s: Of that, inside onnxruntime, up to the last pass.
        first_tokens: Tokens the first pass gave.
        first_ort_s: Time inside onnxruntime up to the first token.
    """

    strategy: str
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    proposed_at_depth: list[int] = field(default_factory=list)
    accepted_at_depth: list[int] = field(default_factory=list)
    proposed_by: Counter[str] = field(default_factory=Counter)
    accepted_by: Counter[str] = field(default_factory=Counter)
    ttft_s: float = 0.0
    total_s: float = 0.0
    ort_s: float = 0.0
    first_tokens: int = 0
    first_ort_s: float = 0.0

    def count_round(
        self,
        tokens: int,
        proposed: int,
        accepted: int,
        elapsed_s: float,
        ort_s: float,
        sources: Sequence[str] = (),
    ) -> None:
        """Record a round.

        Args:
            tokens: Tokens it gave.
            proposed: Draft tokens it judged.
            accepted: Those among `tokens`.
            elapsed_s: Time since the call.
            ort_s: Of that, inside onnxruntime.
            sources: Names of the drafters of the tokens judged, in their order.
        """
        if self.rounds == 0:
            self.ttft_s, self.first_tokens, self.first_ort_s = elapsed_s, tokens, ort_s
        self.ort_s = ort_s
        self.rounds += 1
        self.new_tokens += tokens
        self.steps[tokens] += 1
        new_depths = proposed - len(self.proposed_at_depth)
        self.proposed_at_depth += [0] * new_depths
        self.accepted_at_depth += [0] * new_depths
        for depth in range(proposed):
            self.proposed_at_depth[depth] += 1
            self.accepted_at_depth[depth] += depth < accepted
        for depth, source in enumerate(sources):
            self.proposed_by[source] += 1
            self.accepted_by[source] += depth < accepted

    @property
    def draft_tokens_proposed(self) -> int:
        """Draft tokens judged."""
        return sum(self.proposed_at_depth)

    @property
    def draft_tokens_accepted(self) -> int:
        """Draft tokens that became text."""
        return sum(self.accepted_at_depth)

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that became text."""
        return self.draft_tokens_accepted / max(self.draft_tokens_proposed, 1)

    @property
    def acceptance_rate_at_depth(self) -> list[float]:
        """The same by depth; a draft behind a rejected one counts as rejected."""
        pairs = zip(self.accepted_at_depth, self.proposed_at_depth, strict=True)
        return [accepted / proposed for accepted, proposed in pairs]

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass."""
        return self.new_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first pass, by the time after it.

        The cost of the prompt is `ttft_s`. With a single pass it is all tokens by all time.
        """
        if self.rounds > 1:
            return (self.new_tokens - self.first_tokens) / max(self.total_s - self.ttft_s, 1e-9)
        return self.new_tokens / max(self.total_s, 1e-9)

    @property
    def outside_s(self) -> float:
        """Time outside onnxruntime."""
        return max(self.total_s - self.ort_s, 0.0)

    @property
    def outside_share(self) -> float:
        """Share of the decode time, i.e. after the first pass, that is spent outside onnxruntime."""
        decode_s = self.total_s - self.ttft_s
        return (
            max(decode_s - self.ort_s + self.first_ort_s, 0.0) / decode_s if self.rounds > 1 and decode_s > 0 else 0.0
        )

    def _by_drafter(self) -> str:
        """Return what each drafter gave, where there are several."""
        if len(self.proposed_by) < 2:
            return ""
        shares = (f"{name} {self.accepted_by[name]} of {count}" for name, count in sorted(self.proposed_by.items()))
        return f"; {', '.join(shares)}"

    def line(self) -> str:
        """Return one line for people."""
        steps = " ".join(f"{size}:{count}" for size, count in sorted(self.steps.items())) or "-"
        rates = " ".join(f"{rate:.0%}" for rate in self.acceptance_rate_at_depth)
        drafts = (
            f", {self.draft_tokens_accepted} of {self.draft_tokens_proposed} draft tokens accepted (by depth {rates}"
            f"{self._by_drafter()})"
            if self.draft_tokens_proposed
            else ""
        )
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        return (
            f"{self.strategy}: {self.prompt_tokens} prompt tokens{reused}, "
            f"{self.new_tokens} new in {self.rounds} rounds "
            f"({self.tokens_per_pass:.2f} a pass; steps {steps}){drafts}, first token {self.ttft_s * 1e3:.1f} ms, "
            f"{self.tokens_per_second:.1f} tokens/s, "
            f"onnxruntime {self.ort_s:.3f} s, outside {self.outside_s:.3f} s"
        )
