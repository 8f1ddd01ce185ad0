"""Slow oracles in float64 NumPy, written from ALGORITHM.md alone: none of the package's code is used.

Letters as there: for a layer h = W^T a + b, ``a`` are homogeneous inputs (rows, d_in + 1), ``h``
pre-activations, ``g`` gradients of the loss in them; s, y a curvature pair, H an inverse factor.
"""

import dataclasses

import numpy as np


def homogeneous(inputs, use_bias=True):
    """Rows [a, 1]."""
    return np.hstack([inputs, np.ones((len(inputs), 1))]) if use_bias else inputs


def second_moment(rows):
    """(1/m) sum a a^T, one outer product at a time."""
    return sum(np.outer(a, a) for a in rows) / len(rows)


def split_damping(damping, a, g):
    """l_A and l_G: their product is the damping, their ratio that of the mean eigenvalues of A and G."""
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    return np.sqrt(damping) * pi, np.sqrt(damping) / pi


def bfgs(h, s, y):
    """The textbook product form (I - rho s y^T) H (I - rho y s^T) + rho s s^T."""
    rho, identity = 1 / (s @ y), np.eye(len(s))
    return (identity - rho * np.outer(s, y)) @ h @ (identity - rho * np.outer(y, s)) + rho * np.outer(s, s)


def block_bfgs(h, s, y):
    """S K^-1 S^T + (I - S K^-1 Y^T) H (I - Y K^-1 S^T), pairs in columns, K the symmetric part of S^T Y."""
    k, identity = (s.T @ y + y.T @ s) / 2, np.eye(len(h))
    inverse = np.linalg.inv(k)
    left = identity - s @ inverse @ y.T
    return s @ inverse @ s.T + left @ h @ left.T


def lbfgs(pairs, dim, gamma=1.0):
    """The matrix that pairs (oldest first) make of gamma I."""
    h = gamma * np.eye(dim)
    for s, y in pairs:
        h = bfgs(h, s, y)
    return h


def powell(h, s, y, mu1):
    """Powell's damping on H: afterwards s^T y >= mu1 y^T H y."""
    q = y @ h @ y
    if q > 0 and s @ y <= mu1 * q:
        theta = (1 - mu1) * q / (q - s @ y)
        return theta * s + (1 - theta) * h @ y
    return s


def double_damping(h, s, y, mu1, mu2):
    """Powell's damping on H, then the same on the identity: s^T y >= mu2 s^T s. The paper's up to
    mu2 = 1, where it gives y = s; above, what the package documents of its own."""
    s = powell(h, s, y, mu1)
    if s @ s > 0 and s @ y <= mu2 * s @ s:
        if mu2 > 1:
            return s, y + (mu2 - s @ y / (s @ s)) * s
        theta = (1 - mu2) * s @ s / (s @ s - s @ y) if mu2 < 1 else 0.0
        y = theta * y + (1 - theta) * s
    return s, y


def dp_dlm(h, s, y, mu1, mu2):
    """Powell's damping on H, then Levenberg and Marquardt's."""
    s = powell(h, s, y, mu1)
    return s, y + mu2 * s


def accepted(s, y, gate):
    """The gate of every BFGS update."""
    return s @ y > 0 and s @ y > 1e-4 * (s @ s) * np.linalg.norm(gate)


@dataclasses.dataclass
class Mlp:
    """tanh between dense layers, half the weighted squared error summed over features, mean over the
    batch, plus l2/2 times the squares of all parameters. A matrix is the kernel over the bias, if any."""

    matrices: list
    use_bias: list
    weights: np.ndarray
    l2: float = 0.0

    def passes(self, matrices, x, target):
        """(loss without the penalty, inputs, h, g) with the last three for every layer, by hand."""
        inputs, hs, a = [], [], x
        for i, (w, bias) in enumerate(zip(matrices, self.use_bias, strict=True)):
            inputs.append(homogeneous(a if i == 0 else np.tanh(a), bias))
            a = inputs[-1] @ w
            hs.append(a)
        loss = 0.5 * (self.weights * (a - target) ** 2).sum() / len(x)
        g, gs = self.weights * (a - target) / len(x), []
        for i in reversed(range(len(matrices))):
            gs.insert(0, g)
            if i > 0:
                kernel = matrices[i][: hs[i - 1].shape[1]]
                g = (g @ kernel.T) * (1 - np.tanh(hs[i - 1]) ** 2)
        return loss, inputs, hs, gs


class KBFGS:
    """ALGORITHM.md section 2 step by step, with the norm constraint of section 4 and the start without
    warm start that the package documents: the first batch gives A. Subclasses are the variants."""

    mu1 = 0.2
    damp = staticmethod(double_damping)

    def __init__(self, mlp, lr, damping, *, beta=0.9, kappa=None, warm_a=None, memory=None):
        """``lr`` and ``damping`` are functions of the step. ``memory``: K-BFGS(L)."""
        self.mlp, self.lr, self.damping, self.beta = mlp, lr, damping, beta
        self.kappa, self.memory, self.step, self.cap = kappa, memory, 0, 1.0
        dims = [w.shape for w in mlp.matrices]
        self.m = [np.zeros(d) for d in dims]
        self.s = [np.zeros(d[1]) for d in dims]
        self.y = [np.zeros(d[1]) for d in dims]
        self.h_g = [np.eye(d[1]) for d in dims]
        self.pairs = [[] for _ in dims]
        self.a, self.warm = warm_a, warm_a is not None
        self.h_a = None

    def __call__(self, x, target):
        """One step; returns the loss before it."""
        mlp, beta, k = self.mlp, self.beta, self.step
        lr, root = self.lr(k), np.sqrt(self.damping(k))
        everything = range(len(mlp.matrices))
        loss, inputs, h, g = mlp.passes(mlp.matrices, x, target)
        grads = [inputs[i].T @ g[i] + mlp.l2 * mlp.matrices[i] for i in everything]
        self.m = [beta * m + (1 - beta) * grad for m, grad in zip(self.m, grads, strict=True)]
        self.observe(inputs, root)
        self.observe_grads(g, root)

        d = [self.h_a[i] @ self.m[i] @ self.h_g[i] for i in everything]
        inner = sum((self.m[i] * d[i]).sum() for i in everything)
        self.cap = 1.0 if self.kappa is None else min(1.0, np.sqrt(self.kappa / (lr**2 * inner)))
        mlp.matrices = [mlp.matrices[i] - lr * self.cap * d[i] for i in everything]

        _, inputs_after, h_after, g_after = mlp.passes(mlp.matrices, x, target)
        for i in everything:
            self.outputs(i, h_after[i] - h[i], g_after[i] - g[i], root, gate=g[i].sum(0))
            a_bar = inputs[i].mean(0)
            s_a = self.h_a[i] @ a_bar
            y_a = self.action(i, inputs_after[i], s_a) + root * s_a
            if accepted(s_a, y_a, gate=a_bar):
                self.h_a[i] = bfgs(self.h_a[i], s_a, y_a)
        self.step += 1
        return loss

    def outputs(self, i, dh, dg, root, gate):
        """H_g of layer i takes its pair, from the changes of all rows."""
        self.s[i] = self.beta * self.s[i] + (1 - self.beta) * dh.mean(0)
        self.y[i] = self.beta * self.y[i] + (1 - self.beta) * dg.sum(0)
        self.take(i, self.s[i], self.y[i], root, gate)

    def take(self, i, s, y, root, gate):
        pair = self.damp(self.h_g[i], s, y, self.mu1, root)
        if accepted(*pair, gate=gate):
            self.pairs[i] = [*self.pairs[i], pair]
            if self.memory is None:
                self.h_g[i] = bfgs(self.h_g[i], *pair)
            else:
                self.pairs[i] = self.pairs[i][-self.memory :]
                self.h_g[i] = lbfgs(self.pairs[i], len(s))

    def observe_grads(self, g, root):
        """Nothing: H_g starts at I."""

    def observe(self, inputs, root):
        moments = [second_moment(rows) for rows in inputs]
        if self.step == 0:
            self.a = self.a if self.warm else moments
            self.h_a = [np.linalg.inv(a + root * np.eye(len(a))) for a in self.a]
        else:
            self.a = [self.beta * a + (1 - self.beta) * m for a, m in zip(self.a, moments, strict=True)]

    def action(self, i, inputs_after, s):
        return self.a[i] @ s


class KFQN(KBFGS):
    """Section 3 for dense layers, with what the package documents of its own: H_a starts as a multiple
    of I, and A s is that of the batch in the second pass."""

    damp = staticmethod(dp_dlm)

    def observe(self, inputs, root):
        if self.step == 0:
            self.h_a = [np.eye(a.shape[1]) / ((a**2).mean() + root) for a in inputs]

    def action(self, i, inputs_after, s):
        return sum(a * (a @ s) for a in inputs_after) / len(inputs_after)


class GroupKBFGS(KBFGS):
    """Section 7's second row: a pair of each of several equal parts of the batch, taken one after the
    other, and H_g started at (G + l_G I)^-1 of the first batch's own per-example gradients."""

    def __init__(self, *args, groups=1, start="identity", **options):
        super().__init__(*args, **options)
        self.groups, self.start = groups, start
        self.s, self.y = ([np.zeros((groups, len(s))) for s in self.s] for _ in range(2))

    def observe_grads(self, g, root):
        if self.step == 0 and self.start == "gradients":
            per_example = [len(rows) * rows for rows in g]  # the loss is a mean over them
            self.h_g = [np.linalg.inv(second_moment(r) + root * np.eye(r.shape[1])) for r in per_example]

    def outputs(self, i, dh, dg, root, gate):
        beta, rows = self.beta, len(dh)
        parts = np.split(np.arange(rows), self.groups)
        for b, part in enumerate(parts):
            self.s[i][b] = beta * self.s[i][b] + (1 - beta) * dh[part].mean(0)
            self.y[i][b] = beta * self.y[i][b] + (1 - beta) * (rows * dg[part]).mean(0)
            self.take(i, self.s[i][b], self.y[i][b], root, gate)
