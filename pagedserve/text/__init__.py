"""Text: between token ids and what people read. Used by the API process and the offline LLM only.

The room knows tokenizers, chat templates, stop strings and how tokens become pieces of an answer.
It knows no HTTP, no engine process and no torch.

    files.py        what the JSON files beside a tokenizer say
    formats/        tokenizers in every format, each made one of the library's
    tokenizer.py    text → token ids, token ids → text, what a single token looks like
    chat.py         messages → prompt text, by the model's own template
    detokenizer.py  token after token → pieces of text, never half a character
    stops.py        where an answer ends because of a stop string
    pieces.py       what a single token writes, as far as a table can say it
    deltas.py       all of it for one sequence: engine tokens in, Deltas out
    outputs.py      finished answers in the offline LLM's shapes
"""
