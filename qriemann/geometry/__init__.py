"""The manifold of m x n matrices of rank r: its points, and the record that joins two parameters into one.

A point is X = U S V^T with orthonormal U (m, r), V (n, r) and any S (r, r); S need not be diagonal or invertible, so X = 0
is an ordinary point with a tangent space fixed by U and V. A tangent vector is U C V^T + A V^T + U B^T with U^T A = 0 and
V^T B = 0; its *blocks* are M V = U C + A and M^T U = V C^T + B.
"""

from qriemann.geometry.parameter import FixedRankParameter
from qriemann.geometry.point import FixedRankPoint, point_from_factors, random_orthonormal

__all__ = [
    "FixedRankParameter",
    "FixedRankPoint",
    "point_from_factors",
    "random_orthonormal",
]
