"""Judges that a user might have written, good ones and bad ones."""


def longest(prompts, first, second):
    """The longer response, as a word."""
    words = {True: "a", False: "b"}
    return ["tie" if len(a) == len(b) else words[len(a) > len(b)] for a, b in zip(first, second, strict=True)]


def always_first(prompts, first, second):
    """Sure of what it sees first."""
    return [1.0] * len(prompts)


def too_few(prompts, first, second):
    """Forgets one."""
    return ["a"] * (len(prompts) - 1)
