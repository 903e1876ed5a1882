"""A divergence is one block per language: the steps of CONTRIBUTING.md, in a copy of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.native_build import copy_source
from support.processes import passes, run_python

# The toy is ½ forward_kl + β tvd. It has a sum of the first pass and those of a second one, β in
# value, constants and gradient, and an infinity with a finite gradient: no other divergence has all
# of these. An edit: the file, what the text is inserted before, the text.
PYTHON = (
    "fused_kd/divergences.py",
    "# ------------------------------------------------------- what a careful user composes",
    '''def toy(s: Tensor, t: Tensor, temperature: Tensor, beta: float) -> Term:
    """Return ½ forward_kl + β tvd."""
    kl, tv = forward_kl(s, t, temperature, beta), tvd(s, t, temperature, beta)
    return Term(0.5 * kl.value + beta * tv.value, 0.5 * kl.gradient + beta * tv.gradient)


def _eager_toy(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    kl = _eager_forward_kl(s, t, temperature, beta)
    return 0.5 * kl + beta * _eager_tvd(s, t, temperature, beta)


''',
)
TABLE = (
    "fused_kd/divergences.py",
    "}\nDIVERGENCES = ",
    '    "toy": Divergence("½ KL + β TV", toy, _eager_toy, needs_beta=True),\n',
)
LIST = ("csrc/kd_math.h", "\n\nenum class Divergence", " X(toy)")
RULE = (
    "csrc/kd_math.h",
    "// D = 1/V sum (s-t)^2 / T^2;",
    """// T dD/ds = 1/2 (p - q + beta p (sgn(p-q) - sum p sgn(p-q)))
template <>
struct Rule<Divergence::toy> : Rule<Divergence::forward_kl> {
  static constexpr Divergence DIVERGENCE = Divergence::toy;
  static constexpr bool TWO_PASSES = true;
  template <class F>
  FUSED_KD_HD static void accumulate2(F, F, F P, F Q, F, const Constants<F>& c, F& x, F& y) {
    const F d = fma(-c.ratio, Q, P);
    x = x + magnitude(d);
    y = y + signed_like(P, d);
  }
  template <class R>
  FUSED_KD_HD static R value(const RowSums<R>& r, const RuleOptions<R>& o) {
    return R(0.5) * (r.w / (o.unit * r.d_t) + log(r.d_s / r.d_t) + o.beta * r.x / r.d_s);
  }
  template <class R>
  FUSED_KD_HD static Constants<R> constants(const RowSums<R>& r, R weight,
                                            const RuleOptions<R>& o) {
    return {R(0.5) * weight / r.d_s, r.d_s / r.d_t, o.beta * r.y / r.d_s, o.beta, R(0)};
  }
  template <class F>
  FUSED_KD_HD static F gradient(F, F, F P, F Q, F, const Constants<F>& c, F offset) {
    const F d = fma(-c.ratio, Q, P);
    return fma(c.scale, fma(c.beta, signed_like(P, d), fma(-c.offset, P, d)), offset);
  }
};

""",
)
TRITON = (
    "fused_kd/backends/triton/rules.py",
    "class NoSoftTerm(Rule):",
    '''class Toy(Rule):
    """The gradient is ½ (p - q + β·p·(sgn(p - q) - Σ p·sgn(p - q)))."""

    name = "toy"
    own_sum = YES
    two_passes = YES
    infinite = YES
    add, rebase, add_again = ForwardKL.add, ForwardKL.rebase, TVD.add_again

    @triton.jit
    def loss(sums, again, temperature, beta):
        kl = LN2 * tl.div_rn(sums.w, sums.d_t) + tl.log(tl.div_rn(sums.d_s, sums.d_t))
        return 0.5 * (kl + beta * tl.div_rn(again.x, sums.d_s))

    @triton.jit
    def constants(sums, again, weight, temperature, beta):
        return tl.div_rn(0.5 * weight, sums.d_s), beta * tl.div_rn(again.y, sums.d_s)

    @triton.jit
    def gradient(e, refs, constants, beta):
        scale, offset = constants
        d = tl.fma(-refs.ratio, e.Q, e.P)
        return _by_sign(d, beta * scale, -beta * scale, 0.0) + offset, scale * d

    @triton.jit
    def gradient_alone(e, refs, constants, x, y):
        return tl.fma(e.P, x, y)


''',
)
EDITS = (PYTHON, TABLE, LIST, RULE, TRITON)

PARITY = """
import math, sys, torch
from fused_kd import KDLoss
from fused_kd.testing import eager_kd_loss

torch.manual_seed(0)
s, t = 3 * torch.randn(2, 3, 1003)
s[1, 5] = -math.inf  # infinite, with a finite gradient
keywords = dict(temperature=2.0, divergence="toy", beta=0.3, hard_weight=0.0, reduction="none")
for backend in ("reference", "cpu", "triton"):
    for dtype in (torch.float32, torch.bfloat16):
        student = s.to(dtype).clone().requires_grad_()
        loss = KDLoss(backend=backend, **keywords)(student, t.to(dtype))
        exact = s.to(dtype).double().requires_grad_()
        truth = eager_kd_loss(exact, t.to(dtype).double(), None, **keywords)
        assert loss[1] == truth[1] == math.inf, loss
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=0.0)
        (loss[0] + loss[2]).backward(retain_graph=True)
        (truth[0] + truth[2]).backward()
        rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (8e-3, 1e-5)
        got = student.grad.double()[[0, 2]]
        torch.testing.assert_close(got, exact.grad[[0, 2]], rtol=rtol, atol=atol)
        loss[1].backward()
        assert student.grad.isfinite().all()
try:
    KDLoss(divergence="toy", beta=1.0)
except ValueError as error:
    print("parity,", error)
"""


@pytest.mark.slow
def test_a_divergence_is_one_block_per_language(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    copy_source(tmp_path)
    for file, before, text in EDITS:
        path = tmp_path / file
        source = path.read_text()
        assert source.count(before) == 1, (file, before)
        path.write_text(source.replace(before, text + before))
    build = {"FUSED_KD_CUDA": "0", "FUSED_KD_BUILD": "1"}
    passes(run_python("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, **build))
    interpreted = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    printed = passes(run_python("-c", PARITY, cwd=tmp_path, **interpreted))
    assert printed.startswith("parity, beta"), printed
