"""The share of one process in work that several do: one value wherever (index, count) is meant."""

from dataclasses import dataclass

from sora_jax.errors import UserError


@dataclass(frozen=True)
class ShardSpec:
    """Process `index` of `count`: consecutive rows of a batch, or every count-th part of a dataset."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"the share is {self.index}/{self.count}; it must be one of 0/n to (n-1)/n")

    @staticmethod
    def parse(text: str) -> "ShardSpec":
        """Read "i/n", as `--shard` is given on the command line."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UserError(f"--shard is {text!r}; it must be i/n with i from 0 to n - 1, such as 0/4")
        return ShardSpec(int(index), int(count))

    def rows(self, total: int) -> range:
        """Return the rows of this process in a batch of `total`; UserError if the shares would be unequal."""
        if total % self.count:
            raise UserError(f"a batch of {total} rows cannot be shared by {self.count} processes evenly")
        each = total // self.count
        return range(self.index * each, (self.index + 1) * each)
