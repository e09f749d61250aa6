"""Reference implementations of published systems, straight from their definitions: row by row, with full logits.

Every function returns figures under their names in results.json. Models are transformers' own in float32; the
detokenizer and the windows of lm-evaluation-harness are its own code. Nothing here imports megaft.
"""

import json
import math
import re

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """A causal language model and its tokenizer, read from a folder."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    @property
    def prefix(self):
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @torch.no_grad()
    def logits(self, inputs):
        return self.model(torch.tensor([inputs])).logits[0]

    def nats(self, inputs, targets):
        """Return the nats of `targets`, the last of which follows the last of `inputs`."""
        logits = self.logits(inputs)[-len(targets) :]
        return F.cross_entropy(logits, torch.tensor(targets), reduction="none").double().tolist()

    def ended(self, text):
        """Return the text followed by its most probable next token."""
        return text + self.tokenizer.decode(self.logits(self.encode(text))[-1].argmax())

    def harness(self, context_length=None):
        return HFLM(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            max_length=context_length,
            dtype="float32",
            device="cpu",
            batch_size=1,
        )


def detokenized(text):
    """Megatron-LM's detokenization rules for WikiText, from lm-evaluation-harness, which has the same."""
    return wikitext_detokenizer({"page": text})


def original_tokens(text):
    """Megatron-LM's T_o."""
    return len(text.strip().split(" "))


def pages(text):
    """Split a text before every line of the form ` = Title = `."""
    return re.split(r"(?m)^(?= = [^=].*[^=] = $)", text)[1:]


def megatron(reference, text, context_length, stride):
    """NVIDIA/Megatron-LM fb13c1de^ tasks/zeroshot_gpt: datasets.py _LMDataset, evaluate.py evaluate_and_print_results.

    Window i begins at token i * stride; all but its last `stride` targets are masked, except in the first window, and
    so is the padding after the end. Padding stands to the right, where nothing attends to it, and is left away here.
    """
    tokens = reference.encode(detokenized(text))
    total_targets = len(tokens) - 1
    scored = []
    for index in range(max(math.ceil(max(total_targets - stride, 0) / stride) + 1, 1)):
        window = tokens[index * stride : index * stride + context_length + 1]
        mask = [1] * (len(window) - 1) + [0] * (context_length + 1 - len(window))
        if stride != context_length and index != 0:
            mask[:-stride] = [0] * (context_length - stride)
        if any(mask):
            nats = reference.nats(window[:-1], window[1:])
            scored += [nat for nat, keep in zip(nats, mask, strict=False) if keep]
    loss = sum(scored) / total_targets
    token_ratio = total_targets / (original_tokens(text) - 1)
    return {
        "nats": sum(scored),
        "num_scored_tokens": len(scored),
        "num_tokenized_tokens": len(tokens),
        "num_original_tokens": original_tokens(text),
        "perplexity": math.exp(min(20, loss)),
        "word_perplexity": math.exp(min(20, loss * token_ratio)),
    }


def lm_eval(reference, documents, context_length, detokenize=detokenized):
    """lm-evaluation-harness itself: loglikelihood_rolling, and the denominators of its task wikitext."""
    requests = [Instance("loglikelihood_rolling", {}, (detokenize(page),), i) for i, page in enumerate(documents)]
    nats = -sum(reference.harness(context_length).loglikelihood_rolling(requests, disable_tqdm=True))
    words = sum(len(re.split(r"\s+", page)) for page in documents)
    num_bytes = sum(len(page.encode()) for page in documents)
    return {
        "nats": nats,
        "num_words": words,
        "num_bytes": num_bytes,
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / num_bytes),
        "bits_per_byte": nats / num_bytes / math.log(2),
    }


def megaft(reference, documents, detokenize, context_length, stride):
    """Score every token of every document after a prefix; later windows score `stride` tokens."""
    nats, num_tokens = 0.0, 0
    for document in documents:
        tokens = [reference.prefix, *reference.encode(detokenize(document))]
        end = 1
        while end < len(tokens):
            begin, end = end, min(len(tokens), end + (context_length if end == 1 else stride))
            inputs = tokens[max(0, end - 1 - context_length) : end - 1]
            nats += sum(reference.nats(inputs, tokens[begin:end]))
        num_tokens += len(tokens) - 1
    words = sum(len(document.split()) for document in documents)
    num_bytes = sum(len(document.encode()) for document in documents)
    return {
        "nats": nats,
        "num_scored_tokens": num_tokens,
        "num_words": words,
        "num_bytes": num_bytes,
        "perplexity": math.exp(nats / num_tokens),
        "word_perplexity": math.exp(nats / words),
        "bits_per_byte": nats / num_bytes / math.log(2),
    }


def rows_joined(text):
    """Return the text that perplexity.md tokenizes: rows of Salesforce/wikitext with newlines, blank ones empty."""
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in text.split("\n")[:-1])


@torch.no_grad()
def _sliding(reference, tokens, context_length, stride):
    """The loop that perplexity.md and In-Context RALM share: each window's mean loss and its number of labels."""
    previous_end = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context_length, len(tokens))
        inputs = torch.tensor([tokens[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - previous_end)] = -100
        yield reference.model(inputs, labels=labels).loss.item(), end - previous_end, end - begin
        previous_end = end
        if end == len(tokens):
            return


def hf_docs(reference, text, context_length, stride):
    """huggingface/transformers docs/source/en/perplexity.md: a mean of means, each weighted by its labels minus one."""
    windows = list(_sliding(reference, reference.encode(text), context_length, stride))
    num_loss_tokens = sum(labels - 1 for _, labels, _ in windows)
    # The model shifts labels, which loses the first of a window's tokens and no other.
    num_scored = sum(labels - (labels == length) for _, labels, length in windows)
    mean = sum(loss * (labels - 1) for loss, labels, _ in windows) / num_loss_tokens
    return {"perplexity": math.exp(mean), "num_scored_tokens": num_scored}


def ralm(reference, text, context_length, stride):
    """AI21Labs/in-context-ralm eval_lm.py without retrieval: nats over text.count(" ")."""
    windows = _sliding(reference, reference.encode(text), context_length, stride)
    nats = sum(loss * (labels if labels < context_length else context_length - 1) for loss, labels, _ in windows)
    return {"nats": nats, "word_perplexity": math.exp(nats / text.count(" "))}


def fairseq(reference, text, tokens_per_sample, context_window):
    """facebookresearch/fairseq eval_lm: TokenBlockDataset, LMContextWindowDataset; words as Megatron-11B's recipe.

    Blocks of tokens_per_sample - context_window targets; each block's inputs are its own, which begin with the token
    before the block (the end of text before the first), after at most `context_window` inputs of earlier blocks.
    """
    targets = reference.encode(text)
    source = [reference.prefix, *targets[:-1]]
    block = tokens_per_sample - context_window
    nats, earlier = 0.0, []
    for begin in range(0, len(targets), block):
        inputs = earlier + source[begin : begin + block]
        nats += sum(reference.nats(inputs, targets[begin : begin + block]))
        earlier = inputs[len(inputs) - min(context_window, len(inputs)) :]
    return {
        "nats": nats,
        "num_scored_tokens": len(targets),
        "perplexity": 2 ** (nats / len(targets) / math.log(2)),
        "word_perplexity": math.exp(nats / original_tokens(text)),
    }


def lm_finetuning(reference, text, context_length):
    """Score independent chunks without their first tokens; Megatron's formula extends their mean to all tokens."""
    tokens = reference.encode(detokenized(text))
    chunks = [tokens[begin : begin + context_length] for begin in range(0, len(tokens), context_length)]
    scored = [nat for chunk in chunks if len(chunk) > 1 for nat in reference.nats(chunk[:-1], chunk[1:])]
    loss = sum(scored) / len(scored)
    ratio = (len(tokens) - 1) / (original_tokens(text) - 1)
    return {"nats": sum(scored), "num_scored_tokens": len(scored), "word_perplexity": math.exp(loss * ratio)}


def lambada_rows(lines):
    return [json.loads(line)["text"] for line in lines]


def _last_words(reference, pairs, banned=()):
    """Return accuracy and perplexity of targets, row by row; a target is right if every token is the greedy choice."""
    nats, right = 0.0, 0
    for context, target in pairs:
        inputs = [*context, *target][:-1]
        logits = reference.logits(inputs)[-len(target) :].clone()
        nats += F.cross_entropy(logits, torch.tensor(target), reduction="none").double().sum().item()
        logits[0, list(banned)] = -torch.inf
        right += logits.argmax(-1).tolist() == target
    return {"nats": nats, "accuracy": right / len(pairs), "word_perplexity": math.exp(nats / len(pairs))}


def _strict_pairs(reference, rows, context_of):
    """Megatron-LM's get_tokens: the last word by split(), and the text before it."""
    words = [row.split()[-1] for row in rows]
    return [
        (reference.encode(context_of(row[: row.rfind(word)])), reference.encode(f" {word}"))
        for row, word in zip(rows, words, strict=True)
    ]


def lambada_strict(reference, rows):
    """Megatron-LM --strict-lambada: its README's way."""
    return _last_words(reference, _strict_pairs(reference, rows, str.strip))


def lambada_last_token(reference, rows):
    """Megatron-LM's default: the last token after all others."""
    tokens = [reference.encode(row) for row in rows]
    return _last_words(reference, [(row[:-1], row[-1:]) for row in tokens])


def lambada_stop_word(reference, rows, stop_words):
    """Strict, on OpenAI's preprocessing (openai/gpt-2 issue 131), where no stop word may be the greedy choice."""
    plain = ["\n" + row.replace("\u201c", '"').replace("\u201d", '"').strip() for row in rows]
    banned = {ids[0] for word in stop_words if len(ids := reference.encode(f" {word}")) == 1}
    return _last_words(reference, _strict_pairs(reference, plain, str.rstrip), banned)


def lambada_lm_eval(reference, rows):
    """lm-evaluation-harness itself: task lambada_openai's context and target, and `loglikelihood`."""
    pairs = [(" ".join(row.split(" ")[:-1]), " " + row.split(" ")[-1]) for row in rows]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = reference.harness().loglikelihood(requests, disable_tqdm=True)
    nats = -sum(log_likelihood for log_likelihood, _ in found)
    accuracy = sum(is_greedy for _, is_greedy in found) / len(rows)
    return {"nats": nats, "accuracy": accuracy, "word_perplexity": math.exp(nats / len(rows))}


def cloze_questions(text):
    """Yield context, candidates, the text after the blank, and the answer's index of a Children's Book Test file."""
    for question in text.strip("\n").split("\n\n"):
        *sentences, query = (line.split(" ", 1)[1] for line in question.split("\n"))
        query, answer, _, candidates = query.split("\t")
        before, after = query.split("XXXXX")
        yield " ".join([*sentences, before]).rstrip(), candidates.split("|"), after, candidates.split("|").index(answer)


def cloze(reference, text, has_prefix):
    """GPT-2 paper, section 3.2: choose the candidate that makes the rest of the sentence most probable."""
    nats, right, number = 0.0, 0, 0
    for context, candidates, after, answer in cloze_questions(text):
        inputs = [reference.prefix] * has_prefix + reference.encode(context)
        targets = [reference.encode(f" {candidate}{after}") for candidate in candidates]
        each = [sum(reference.nats([*inputs, *target][:-1], target)) for target in targets]
        nats, right, number = nats + each[answer], right + (each.index(min(each)) == answer), number + 1
    return {"nats": nats, "accuracy": right / number}
