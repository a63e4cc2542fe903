"""A stand-in for a tokenizer."""


class WordEncoder:
    """A token per word or line end, and one in front; the ids are handed out as words come."""

    def __init__(self):
        self.ids = {}

    def plain(self, text):
        words = text.replace("\n", " \n ").split(" ")
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in words]

    def beginning(self):
        return [0]

    def context(self, text):
        return [0, *self.plain(text)]

    def question(self, question, answer_prefix):
        return self.plain(question + answer_prefix)

    def decode(self, tokens):
        words = {number: word for word, number in self.ids.items()} | {0: ""}
        return " ".join(words[token] for token in tokens)
