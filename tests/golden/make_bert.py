"""A tiny random BERT folder with torch's own outputs: `python tests/golden/make_bert.py` (needs
torch, transformers).
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent / "bert"
CAPTIONS = ["a red bag", "a blue boot above a red bag"]

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "bag", "boot", "above"]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(words),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
)
model = BertModel(config, add_pooling_layer=False).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.4)
model.save_pretrained(FOLDER)
tokenizer.save(str(FOLDER / "tokenizer.json"))
outputs = {}
for i, caption in enumerate(CAPTIONS):
    ids = torch.tensor([tokenizer.encode(caption).ids])
    outputs[str(i)] = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        .last_hidden_state[0]
        .detach()
        .numpy()
    )
np.savez(FOLDER / "expected.npz", captions=np.asarray(CAPTIONS), **outputs)
