"""Orthogonal matching pursuit with non-negative coefficients, differentiable on a fixed support."""

from typing import Any

import torch
from torch import Tensor

from .pursuit import Codes

# Inputs per block: the atoms on their supports are ROW_BLOCK * k * d numbers.
ROW_BLOCK = 512


def orthogonal_pursuit(
    x: Tensor,
    atoms: Tensor,
    k: int,
    *,
    correlations: Tensor | None = None,
    residual_threshold: float = 0.0,
) -> Codes:
    """k steps: choose the atom most correlated with the residual, refit all chosen ones.

    The re-fit is non-negative least squares over the atoms chosen so far (Lawson & Hanson 1974,
    chapter 23), exact up to rounding. An input stops when no further atom correlates positively
    with its residual, or when the norm of its residual is below `residual_threshold`.

    Args:
        x: inputs, bias removed, (n, d), float32 or float64.
        atoms: unit rows, (m, d), of the same dtype.
        correlations: ``x @ atoms.T``, if already computed.

    Returns:
        Codes with each atom at most once per input. Gradients are those of least squares on the
        finally active atoms: the support is fixed.
    """
    with torch.no_grad():
        fixed_x, fixed_atoms = x.detach(), atoms.detach()
        if correlations is None:
            correlations = fixed_x @ fixed_atoms.T
        k = min(k, atoms.shape[0])
        parts = [
            _support(fixed_x[rows], fixed_atoms, k, correlations[rows].detach(), residual_threshold)
            for rows in _blocks(x)
        ]
        indices = torch.cat([part[0] for part in parts])
        active = torch.cat([part[1] for part in parts]) > 0
    values, residual = _LeastSquares.apply(x, atoms, indices, active)  # type: ignore[misc]
    return Codes(indices, values, residual)


def _support(
    x: Tensor, atoms: Tensor, k: int, scores: Tensor, residual_threshold: float
) -> tuple[Tensor, Tensor]:
    """Chosen atoms (n, k) and their coefficients (n, k)."""
    n, d = x.shape
    indices = torch.zeros(n, k, dtype=torch.int64, device=x.device)
    chosen = x.new_zeros(n, k, d)
    gram = x.new_zeros(n, k, k, dtype=torch.float64)
    targets = x.new_zeros(n, k, dtype=torch.float64)
    values = x.new_zeros(n, k, dtype=torch.float64)
    valid = torch.zeros(n, k, dtype=torch.bool, device=x.device)
    active = torch.ones(n, dtype=torch.bool, device=x.device)
    # Smaller correlations are rounding errors: those of atoms in the span of the chosen ones.
    floor = 32 * torch.finfo(x.dtype).eps * x.norm(dim=1)
    residual = x
    for step in range(k):
        if step:
            scores = (residual @ atoms.T).scatter(1, indices[:, :step], -torch.inf)
        index = scores.argmax(dim=1)
        best = scores.gather(1, index[:, None]).squeeze(1)
        valid[:, step] = active & (best > floor)
        indices[:, step] = index
        atom = atoms.index_select(0, index)
        chosen[:, step] = atom
        row = torch.einsum("nsd,nd->ns", chosen[:, : step + 1], atom).double()
        gram[:, step, : step + 1] = gram[:, : step + 1, step] = row
        targets[:, step] = torch.linalg.vecdot(x, atom).double()
        size = slice(0, step + 1)
        values[:, size] = non_negative_least_squares(
            gram[:, size, size], targets[:, size], valid[:, size], values[:, size]
        )
        residual = x - torch.einsum("ns,nsd->nd", values[:, size].to(x.dtype), chosen[:, size])
        active &= valid[:, step]
        if residual_threshold > 0:
            active &= residual.norm(dim=1) >= residual_threshold
        if not x.is_meta and not active.any():
            break
    return indices, values


def non_negative_least_squares(
    gram: Tensor, targets: Tensor, valid: Tensor, start: Tensor
) -> Tensor:
    """argmin over z >= 0 of z^T gram z / 2 - targets . z for each of n small problems.

    Args:
        gram: (n, s, s) positive semi-definite.
        targets: (n, s).
        valid: variables that may be positive, (n, s) bool.
        start: a feasible point, optimal without the newest variable, (n, s).
    """
    z = torch.where(valid, start, 0.0)
    if z.is_meta:
        return z
    s = gram.shape[-1]
    tolerance = 1e-10 * targets.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    passive = z > 0
    passive |= valid & ((targets - torch.einsum("nij,nj->ni", gram, z)) > tolerance)
    eye = torch.eye(s, dtype=gram.dtype, device=gram.device)
    open_rows = torch.arange(gram.shape[0], device=gram.device)
    for _ in range(4 * s + 4):  # each round frees or fixes one variable; the bound ends cycles
        if open_rows.numel() == 0:
            break
        g, b, p, old = gram[open_rows], targets[open_rows], passive[open_rows], z[open_rows]
        both = p[:, :, None] & p[:, None, :]
        system = torch.where(both, g, 0.0) + eye * torch.where(p, 1e-12, 1.0)[:, :, None]
        new = torch.linalg.solve(system, torch.where(p, b, 0.0)[..., None]).squeeze(-1)
        new = torch.where(p, new, 0.0)
        falling = p & (new <= 0)
        # Move towards the solution until the first variable reaches 0, and fix it there.
        room = torch.where(falling, old / (old - new).clamp_min(1e-300), torch.inf)
        share = room.amin(dim=1, keepdim=True).clamp(max=1.0)
        moved = old + share * (new - old)
        blocked = falling & (room <= share)
        inside = ~falling.any(dim=1, keepdim=True)
        gradient = b - torch.einsum("nij,nj->ni", g, new)
        candidates = torch.where(valid[open_rows] & ~p, gradient, -torch.inf)
        best, free = candidates.max(dim=1, keepdim=True)
        frees = inside & (best > tolerance[open_rows])
        z[open_rows] = torch.where(inside, new, torch.where(blocked, 0.0, moved))
        passive[open_rows] = (p & ~blocked).scatter(1, free, (p & ~blocked).gather(1, free) | frees)
        open_rows = open_rows[~(inside & ~frees).squeeze(1)]
    return z.clamp_min(0.0)


class _LeastSquares(torch.autograd.Function):
    """z = argmin ||x - D_S^T z|| on a fixed support S, and the residual, with their gradients.

    With A = D_S D_S^T, r = x - D_S^T z and an incoming gradient g for z: u = A^-1 g, w = D_S^T u
    give dx = w and dD_j = u_j r - z_j w.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, atoms: Tensor, indices: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, residual = x.new_zeros(indices.shape), x.clone()
        for rows in _blocks(x):
            chosen, system = _system(atoms, indices[rows], active[rows])
            target = torch.einsum("nsd,nd->ns", chosen, x[rows]).double()
            z = torch.linalg.solve(system, target[..., None]).squeeze(-1).to(x.dtype)
            values[rows] = z * active[rows]
            residual[rows] -= torch.einsum("ns,nsd->nd", values[rows], chosen)
        ctx.save_for_backward(atoms, indices, active, values, residual)
        return values, residual

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_values: Tensor, grad_residual: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        atoms, indices, active, values, residual = ctx.saved_tensors
        grad_x, grad_atoms = torch.zeros_like(residual), torch.zeros_like(atoms)
        for rows in _blocks(residual):
            chosen, system = _system(atoms, indices[rows], active[rows])
            z, q = values[rows], grad_residual[rows]
            # the residual depends on z as well as on x and D
            g = (grad_values[rows] - torch.einsum("nsd,nd->ns", chosen, q)) * active[rows]
            u = torch.linalg.solve(system, g.double()[..., None]).squeeze(-1).to(q.dtype)
            w = torch.einsum("ns,nsd->nd", u, chosen)
            grad_x[rows] = w + q
            per_atom = u[..., None] * residual[rows][:, None] - z[..., None] * (w + q)[:, None]
            grad_atoms.index_add_(0, indices[rows].reshape(-1), per_atom.reshape(-1, q.shape[1]))
        return grad_x, grad_atoms, None, None


def _system(atoms: Tensor, indices: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The atoms of the support (n, s, d), 0 where inactive, and their Gram matrices in float64."""
    chosen = atoms[indices] * active[..., None]
    gram = torch.einsum("nsd,ntd->nst", chosen, chosen).double()
    return chosen, gram + torch.diag_embed(torch.where(active, 1e-12, 1.0).double())


def _blocks(x: Tensor) -> list[slice]:
    return [slice(start, start + ROW_BLOCK) for start in range(0, max(x.shape[0], 1), ROW_BLOCK)]
