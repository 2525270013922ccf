"One iteration of the search: which numbers each half moves, by gradients of its own."

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from msinet.core import set_seed
from msinet.engine.learner import sgd, trainable_params
from msinet.necks import BNNeck, ReIDNet
from msinet.space import alphas, expected_cost, frozen_stats, slot_macs, supernet
from msinet.tcm import Memory
from msinet.training.search import keep_step, SearchStep, unrolled_grad


def make_step(val=lambda batch: batch, double=False, **kw):
    "A step of a narrow supernet, and a batch of noise; `val` makes the validation twin's batch of it."
    set_seed(0)
    net = ReIDNet(supernet((8, 16, 24, 32)), BNNeck((32,))).train()
    choices = [p for n, p in net.named_parameters() if n.endswith("alpha")]
    weights = [p for n, p in net.named_parameters() if not n.endswith("alpha") and p.requires_grad]
    batch = torch.randn(8, 3, 32, 16), torch.arange(4).repeat_interleave(2)
    mems = [Memory(4, 32), Memory(4, 32)]
    for m in mems:
        m.fill(torch.randn(8, 32), batch[1])
    if double:
        batch = batch[0].double(), batch[1]
        [m.double() for m in (net, *mems)]
    opts = sgd(weights, 0.1, 0.0), torch.optim.Adam(choices, 0.01)
    return SearchStep(net, *mems, iter(lambda: val(batch), None), *opts, **kw), batch


def turned(batch):
    "Other images of the same identities: mirrored, and each in its neighbour's place."
    return batch[0].flip(3).roll(1, 0), batch[1]


def numbers(net):
    "α, and all other numbers, running statistics included."
    sd = {k: v.clone() for k, v in net.state_dict().items() if "num_batches" not in k}
    alpha = [k for k in sd if k.endswith("alpha")]
    return {k: sd[k] for k in alpha}, {k: v for k, v in sd.items() if k not in alpha}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_each_half_moves_its_own_numbers_alone():
    step, batch = make_step()
    alpha, rest = numbers(step.net)
    step.omega(batch)
    alpha_then, rest_then = numbers(step.net)
    assert same(alpha, alpha_then) and not same(rest, rest_then)
    step.alpha()
    assert not same(alpha_then, numbers(step.net)[0]) and same(rest_then, numbers(step.net)[1])


def test_alpha_follows_the_gradient_of_the_validation_loss():
    "Adam's first step moves each number by its rate against the sign of its gradient."
    step, (x, y) = make_step(double=True)
    before = alphas(step.net)
    with frozen_stats(step.net):
        loss = step.c_val.loss(step.net(x).branches[0].f, y)
    g = torch.stack(torch.autograd.grad(loss, trainable_params(step.opt_alpha)))
    step.alpha()
    assert_close(alphas(step.net), before - 0.01 * g / (g.abs() + 1e-8))


def test_a_leak_reaches_the_weights_and_not_alpha():
    ends = []
    for leak in (False, True):
        step, batch = make_step(turned, alpha_first=True, leak=leak)
        step(batch)
        ends.append(numbers(step.net))
    assert same(ends[0][0], ends[1][0]) and not same(ends[0][1], ends[1][1])


def through_a_step(step, batch, val, rate):
    "α's gradient by autograd through one SGD step of ω."
    omega = trainable_params(step.opt_omega)
    ws = {n: p for n, p in step.net.named_parameters() if any(p is q for q in omega)}
    loss = lambda memory, b, new: memory.loss(functional_call(step.net, new, (b[0],)).branches[0].f, b[1])
    with frozen_stats(step.net):
        gs = torch.autograd.grad(loss(step.c_tr, batch, ws), [*ws.values()], create_graph=True, allow_unused=True)
        ahead = {n: p if g is None else p - rate * g for (n, p), g in zip(ws.items(), gs)}
        return torch.stack(torch.autograd.grad(loss(step.c_val, val, ahead), trainable_params(step.opt_alpha)))


def test_the_second_order_is_the_gradient_through_a_step():
    step, batch = make_step(turned, double=True, alpha_grad=partial(unrolled_grad, eps=1e-6))
    for n, p in step.net.named_parameters():
        if n.endswith(("gamma", "bn.weight")):
            nn.init.constant_(p, 0.5 if n.endswith("gamma") else 0.3)  # small maps, so that no softmax saturates
    step.opt_omega.param_groups[0]["lr"] = 1e-3
    want, first = [through_a_step(step, batch, turned(batch), rate) for rate in (1e-3, 0.0)]
    rest = numbers(step.net)[1]
    step.alpha(batch)
    got = torch.stack([p.grad for p in trainable_params(step.opt_alpha)])
    assert same(rest, numbers(step.net)[1])
    assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert (want - first).norm() > 100 * first.norm()  # the notebook's warning: the second term is the larger by far


def test_a_cost_adds_its_gradient_and_nothing_else():
    grads = []
    for weight in (0.0, 2.0):
        step, batch = make_step()
        macs = slot_macs(step.net, (32, 16))
        step.price = lambda: weight * expected_cost(step.net, macs)
        step.alpha()
        grads.append(torch.stack([p.grad for p in trainable_params(step.opt_alpha)]))
    net = make_step()[0].net
    choices = [p for n, p in net.named_parameters() if n.endswith("alpha")]
    want = 2 * torch.stack(torch.autograd.grad(expected_cost(net, macs), choices))
    assert_close(grads[1] - grads[0], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n,k", [(7, 3), (7, 7), (100, 9), (5, 1)])
def test_kept_iterations_lie_evenly_and_the_last_is_one(n, k):
    kept = [i for i in range(1, n + 1) if keep_step(i, n, k)]
    assert len(kept) == k and kept[-1] == n
    gaps = [b - a for a, b in zip([0, *kept], kept)]
    assert max(gaps) - min(gaps) <= 1
