"""Texts of prompts padded on the left and responses padded on the right, as tests write them."""

import torch

from rlhf.models.response import texts_of


def texts(ids, attention, n_response):
    """ids int [B, P + T], attention bool [B, P + T] -> Texts of all rows in one pass."""
    rows = [row[real].tolist() for row, real in zip(ids, attention, strict=True)]
    answers = attention[:, -n_response:].sum(1).tolist()
    prompts = [row[: len(row) - n] for row, n in zip(rows, answers, strict=True)]
    responses = [row[len(row) - n :] for row, n in zip(rows, answers, strict=True)]
    return texts_of(prompts, responses, [range(len(rows))], n_response, ids.device)[0]


def run(model, ids, attention, n_response):
    """Of an ActorCritic: log-probs and entropies [B, T], zero off the response, and values [B, T + 1]."""
    given = texts(ids, attention, n_response)
    logp, entropy, _ = model(given)
    values = model.states_and_values(given)[1]
    first = given.lengths - attention[:, -n_response:].sum(1) - 1
    columns = (first.unsqueeze(1) + torch.arange(n_response + 1)).clamp(max=values.shape[1] - 1)
    grid = torch.zeros(len(ids) * n_response)
    logp, entropy = (grid.index_copy(0, given.places, x).view(-1, n_response) for x in (logp, entropy))
    return logp, entropy, values.gather(1, columns)
