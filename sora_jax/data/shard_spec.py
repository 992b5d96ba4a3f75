"""The share of one process in work that is split over several."""

from dataclasses import dataclass

from sora_jax.config import check

RULE = "it must be i/n with i from 0 to n - 1, such as 0/4"


@dataclass(frozen=True)
class ShardSpec:
    """Process `index` of `count`: it has consecutive rows of a batch, or every count-th part of a dataset."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        check(0 <= self.index < self.count, f"--shard is '{self.index}/{self.count}'; {RULE}")

    @staticmethod
    def parse(text: str) -> "ShardSpec":
        """Read "i/n", as `--shard` is given on the command line."""
        index, _, count = text.partition("/")
        check(index.isdigit() and count.isdigit(), f"--shard is {text!r}; {RULE}")
        return ShardSpec(int(index), int(count))

    def rows(self, total: int) -> range:
        """Return the rows of this process in a batch of `total`; UserError if the shares would be unequal."""
        check(total % self.count == 0, f"batch is {total} rows; it must be a multiple of the {self.count} processes")
        each = total // self.count
        return range(self.index * each, (self.index + 1) * each)
