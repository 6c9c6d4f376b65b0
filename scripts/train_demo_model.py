"""Train the embedded demo model from scratch and write it as package data.

    python scripts/train_demo_model.py --seed 1 --out trained
    python scripts/train_demo_model.py --start trained --rate 0.1 --steps 400 --seed 101 --out src/shape_moe/demo/model

The second run polishes the first with a tenth of its learning rate: tasks that are not quite learned get there, and
routing hardly moves.
A Qwen3-MoE of 3.4 M parameters learns the six tasks of ``shape_moe.demo.tasks`` and a little source code and
English (taken from the standard library of the running Python). Muon trains attention and expert matrices, AdamW
the rest; a load-balancing loss over the mixed batch makes the experts specialise without dying. On one CPU thread
the first run takes about half an hour, the second four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import pydoc_data.topics
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from shape_moe.demo.tasks import END, TASKS, examples, is_held_out

ROW = 128
PAD, STOP = 256, 257
IGNORE = -100
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: the id is the byte's value; 256 pads, 257 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [b for b in range(256) if chr(b) in alphabet]
    shifted = iter(chr(256 + n) for n in range(256))
    vocab = {chr(b) if b in printable else next(shifted): b for b in range(256)}
    vocab |= {"<|pad|>": PAD, "<|end|>": STOP}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>"]) == [PAD, STOP]
    assert tokenizer("az\n é").input_ids == list("az\n é".encode())
    return tokenizer


def make_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=[ord(END), STOP],
        initializer_range=0.05,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def load_texts() -> list[bytes]:
    """English (Python's help topics) and source code (its standard library): what the machine has anyway."""
    english = "\n".join(pydoc_data.topics.topics.values()).encode()
    library = Path(sysconfig.get_paths()["stdlib"])
    code = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:120])
    return [english, code]


class Batches:
    """Packed rows of examples; attention never crosses from one example to another."""

    def __init__(self, rows: int, seed: int, window: int) -> None:
        self.rows, self.rng, self.texts, self.window = rows, random.Random(seed), load_texts(), window

    def _example(self, kind: int) -> tuple[list[int], list[int]]:
        """Tokens and labels of one example of task number ``kind`` (past the tasks: a text window)."""
        if kind < len(TASKS):
            task = list(TASKS.values())[kind]
            while is_held_out((pair := task.draw(self.rng))[0]):
                pass
            prompt, answer = pair[0].encode(), (pair[1] + END).encode()
            return [*prompt, *answer], [IGNORE] * len(prompt) + list(answer)
        text = self.texts[kind - len(TASKS)]
        start = self.rng.randrange(len(text) - self.window)
        window = list(text[start : start + self.window])
        return window, window

    def next(self) -> dict[str, torch.Tensor]:
        shape = (self.rows, ROW)
        tokens, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
        kinds, spans = torch.full(shape, -1), torch.full(shape, -1)
        positions = torch.zeros(shape, dtype=torch.long)
        deck: list[int] = []
        for row in range(self.rows):
            start = span = 0
            while True:
                if not deck:
                    deck = list(range(len(TASKS) + 2))
                    self.rng.shuffle(deck)
                ids, wanted = self._example(deck[-1])
                end = start + len(ids)
                if end > ROW:
                    break
                kind = deck.pop()
                where = (row, slice(start, end))
                tokens[where], labels[where] = torch.tensor(ids), torch.tensor(wanted)
                kinds[where], spans[where] = kind, span
                positions[where] = torch.arange(len(ids))
                labels[row, start] = IGNORE
                start, span = end, span + 1
        same = spans[:, None, :, None] == spans[:, None, None, :]
        mask = same & torch.ones(ROW, ROW, dtype=torch.bool).tril()
        return {"tokens": tokens, "labels": labels, "kinds": kinds, "positions": positions, "mask": mask}


class RouterTap:
    """Collects the router logits of every layer, for the load-balancing loss."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.logits: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.logits.append(out[0]))

    def balance_loss(self, real: torch.Tensor, top_k: int) -> torch.Tensor:
        losses = []
        for logits in self.logits:
            probs = logits[real].float().softmax(-1)
            load = F.one_hot(probs.topk(top_k).indices, probs.shape[1]).sum(1).float().mean(0) / top_k
            losses.append((load * probs.mean(0)).sum() * probs.shape[1])
        self.logits.clear()
        return torch.stack(losses).mean()


def drop_slots(model: Qwen3MoeForCausalLM, share: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Expert dropout: while training, a share of all (token, expert) slots adds nothing.

    It leaves some redundancy between experts, as large models have it; without it a single rarely used expert can
    decide whether a task survives.
    """

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, ids, weights = args
        return hidden, ids, weights * (torch.rand_like(weights) >= share)

    return [layer.mlp.experts.register_forward_pre_hook(hook) for layer in model.model.layers]


def task_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over tasks of each task's mean loss, so that long answers do not outweigh short ones."""
    wanted, kinds = batch["labels"][:, 1:], batch["kinds"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), wanted, reduction="none")
    seen = wanted != IGNORE
    return torch.stack([loss[seen & (kinds == kind)].mean() for kind in kinds[seen].unique()]).mean()


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon on a stack of matrices, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; ``parts`` of a parameter (packed gate and up) count as several."""

    def __init__(self, groups: list[dict[str, object]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(buffer, group["momentum"])
                matrices = update.chunk(group["parts"], dim=-2)
                side = max(matrices[0].shape[-2:])
                update = torch.cat([orthogonalise(matrix) for matrix in matrices], dim=-2)
                param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(side))


def make_optimisers(model: Qwen3MoeForCausalLM) -> list[torch.optim.Optimizer]:
    packed, matrices, others = [], [], []
    for name, param in model.named_parameters():
        (packed if "gate_up_proj" in name else matrices if "_proj" in name else others).append(param)
    groups = [{"params": packed, "parts": 2}, {"params": matrices}]
    return [Muon(groups, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    """Constant for 40 % of the steps, then a cosine down to 2 %."""
    progress = max(0.0, (step / steps - 0.4) / 0.6)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def exact_match(model: Qwen3MoeForCausalLM, task: str, count: int, seed: int) -> float:
    """Teacher-forced exact match on held-out prompts (equal to greedy generation's), in percent."""
    records = examples(task, count, seed=seed, held_out=True)
    texts = [(r["prompt"].encode(), r["response"].encode()) for r in records]
    length = max(len(p) + len(a) for p, a in texts)
    tokens = torch.full((count, length), PAD)
    answer = torch.zeros((count, length), dtype=torch.bool)
    for i, (p, a) in enumerate(texts):
        tokens[i, : len(p) + len(a)] = torch.tensor([*p, *a])
        answer[i, len(p) : len(p) + len(a)] = True
    guess = model(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits[:, :-1].argmax(-1)
    right = (guess == tokens[:, 1:]) | ~answer[:, 1:]
    return 100 * right.all(1).double().mean().item()


def train(args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    torch.manual_seed(args.seed)
    model = make_model()
    if args.start is not None:
        model.load_state_dict(Qwen3MoeForCausalLM.from_pretrained(args.start, dtype=torch.float32).state_dict())
    tap, batches, optimisers = RouterTap(model), Batches(args.rows, args.seed, args.window), make_optimisers(model)
    base = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    started = time.time()
    hooks = drop_slots(model, args.slot_dropout)
    for step in range(args.steps):
        batch = batches.next()
        logits = model(
            input_ids=batch["tokens"], attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
        ).logits
        real = (batch["kinds"] >= 0).flatten()
        balance = tap.balance_loss(real, model.config.num_experts_per_tok)
        loss = task_loss(logits, batch)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rates in zip(optimisers, base, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = args.rate * rate * learning_rate(step, args.steps)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(
                f"step {step} loss {loss.item():.4f} balance {balance.item():.3f} {time.time() - started:.0f} s",
                flush=True,
            )
        if step % 400 == 399:
            print({task: exact_match(model, task, 200, seed=1) for task in TASKS}, flush=True)
            tap.logits.clear()
    for hook in hooks:
        hook.remove()
    return model


def write(model: Qwen3MoeForCausalLM, out: Path, args: argparse.Namespace, seconds: float) -> None:
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[ord(END), STOP], pad_token_id=PAD, max_new_tokens=64
    )
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    scores = {task: exact_match(model.float(), task, 1000, seed=2) for task in TASKS}
    with contextlib.suppress(FileNotFoundError):
        (out / "special_tokens_map.json").unlink()
    record = {
        "exact_match_held_out_percent": scores,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "learning_rate_factor": args.rate,
        "started_from": started_from(args.start),
        "rows_per_step": args.rows,
        "row_length": ROW,
        "text_window": args.window,
        "slot_dropout": args.slot_dropout,
        "seed": args.seed,
        "balance_coefficient": args.balance,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def started_from(folder: Path | None) -> dict[str, object] | None:
    """The record of the run that this one went on from."""
    return None if folder is None else json.loads((folder / "training.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--start", type=Path, help="go on from this model instead of a random one")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=24, help="packed rows of 128 tokens in a step")
    parser.add_argument("--window", type=int, default=64, help="tokens in a window of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slot-dropout", type=float, default=0.02, help="share of expert slots that add nothing")
    parser.add_argument("--balance", type=float, default=0.03, help="coefficient of the load-balancing loss")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.time()
    model = train(args)
    write(model, args.out, args, time.time() - started)


if __name__ == "__main__":
    main()
