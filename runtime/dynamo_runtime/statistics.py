"""What one generation cost."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Counts and times of one generation; times in seconds.

    Attributes:
        strategy: Its name.
        prompt_tokens: Tokens of the prompt.
        reused_tokens: Those of them the cache already held.
        new_tokens: Tokens generated, a final end-of-sequence token included.
        passes: Forward passes that gave tokens; the last one over the prompt is the first of them.
        steps: Histogram: tokens a pass gave -> passes.
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
    passes: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    ttft_s: float = 0.0
    total_s: float = 0.0
    ort_s: float = 0.0
    first_tokens: int = 0
    first_ort_s: float = 0.0

    def count_pass(self, tokens: int, elapsed_s: float, ort_s: float) -> None:
        """Record a pass of `tokens` tokens, `elapsed_s` after the call, `ort_s` of it inside onnxruntime."""
        if self.passes == 0:
            self.ttft_s, self.first_tokens, self.first_ort_s = elapsed_s, tokens, ort_s
        self.ort_s = ort_s
        self.passes += 1
        self.new_tokens += tokens
        self.steps[tokens] += 1

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass."""
        return self.new_tokens / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first pass, by the time after it.

        The cost of the prompt is `ttft_s`. With a single pass it is all tokens by all time.
        """
        if self.passes > 1:
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
            max(decode_s - self.ort_s + self.first_ort_s, 0.0) / decode_s if self.passes > 1 and decode_s > 0 else 0.0
        )

    def line(self) -> str:
        """One line for people."""
        steps = " ".join(f"{size}:{count}" for size, count in sorted(self.steps.items())) or "-"
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        return (
            f"{self.strategy}: {self.prompt_tokens} prompt tokens{reused}, "
            f"{self.new_tokens} new in {self.passes} passes "
            f"({self.tokens_per_pass:.2f} a pass; steps {steps}), first token {self.ttft_s * 1e3:.1f} ms, "
            f"{self.tokens_per_second:.1f} tokens/s, "
            f"onnxruntime {self.ort_s:.3f} s, outside {self.outside_s:.3f} s"
        )
