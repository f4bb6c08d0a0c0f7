"""Kyutai's own `moshi` package over one recording, written down. A script: it runs in an interpreter that has `moshi`.

    oracle_moshi.py CHECKPOINT PCM.npy OUT.npz DTYPE [LEAD.npy]

OUT holds codes (T, K), tokens (T,), logits (T, V) and pause (T, heads) of T frames. The language model is stepped twice on
the first frame, which makes it see each frame one step late, as servers do (contract section 7.3). LEAD holds tokens
(T,) that it is fed instead of its own.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from moshi.models import LMGen, loaders


def main(checkpoint: Path, pcm_file: str, out: str, dtype: str, lead_file: str | None = None) -> None:
    info = loaders.CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=checkpoint / "model.safetensors",
        mimi_weights=checkpoint / "mimi.safetensors",
        tokenizer=checkpoint / "tokenizer.model",
        config_path=checkpoint / "config.json",
    )
    frames = torch.from_numpy(np.load(pcm_file)).view(-1, 1, 1, 1_920)
    mimi = info.get_mimi(device="cpu")
    lm = info.get_moshi(device="cpu", dtype=getattr(torch, dtype))
    lead = None if lead_file is None else np.load(lead_file)
    tokens: list[int] = []
    logits: list[np.ndarray] = []

    def write_down(token: torch.Tensor) -> None:
        tokens.append(int(token))
        if lead is not None:
            token.fill_(int(lead[len(tokens) - 1]))

    generator = LMGen(
        lm,
        use_sampling=False,
        on_text_hook=write_down,
        on_text_logits_hook=lambda row: logits.append(row.float().flatten().numpy().copy()),
    )
    pauses = []
    with torch.no_grad(), mimi.streaming(1), generator.streaming(1):
        codes = [mimi.encode(frame) for frame in frames]  # (1, K, 1) each
        for code in [codes[0], *codes[:-1]]:
            stepped = generator.step_with_extra_heads(code)
            pauses.append([] if stepped is None else [float(head[0, 0, 0]) for head in stepped[1]])
    heads = max(len(pause) for pause in pauses)
    np.savez(
        out,
        codes=torch.cat(codes, -1)[0].T.numpy(),
        tokens=np.array(tokens),
        logits=np.stack(logits),
        pause=np.array([pause or [np.nan] * heads for pause in pauses]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
