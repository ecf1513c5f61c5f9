//! Element types, shapes and tensor types.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most bytes of one tensor, 2⁴⁸: far beyond any memory, and sums of many of them do not overflow.
pub const MOST_BYTES: usize = 1 << 48;

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float: the type models train in.
    F32,
    /// 64-bit float: for gradient checks.
    F64,
    /// bfloat16, the upper half of a 32-bit float: what activations and weights may be kept in. Sums are made in `F32`.
    Bf16,
    /// IEEE 754 binary16: for the same; above 65504 it is infinite.
    F16,
    /// 32-bit signed integer: token ids, indices, masks, random keys.
    I32,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 => 8,
        }
    }

    /// Whether it is one of the 16-bit floats.
    #[must_use]
    pub fn is_half(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16)
    }

    /// The type that sums and statistics of it have: f32 for a 16-bit float, its own otherwise.
    #[must_use]
    pub fn sums(self) -> Self {
        if self.is_half() { Self::F32 } else { self }
    }

    /// Whether it is a floating-point type.
    #[must_use]
    pub fn is_float(self) -> bool {
        self != Self::I32
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::I32 => "i32",
        })
    }
}

/// The extents of a tensor, outermost first. An empty shape is a scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(pub Vec<usize>);

impl Shape {
    /// The shape of a scalar.
    #[must_use]
    pub fn scalar() -> Self {
        Self(Vec::new())
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// Number of axes.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The last extent (1 for a scalar): the length of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// All but the last extent, multiplied: the number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.leading().iter().product()
    }

    /// All but the last extent.
    #[must_use]
    pub fn leading(&self) -> &[usize] {
        &self.0[..self.0.len().saturating_sub(1)]
    }

    /// This shape with another last extent.
    #[must_use]
    pub fn with_cols(&self, cols: usize) -> Self {
        let mut dims = self.leading().to_vec();
        dims.push(cols);
        Self(dims)
    }

    /// Whether `self` equals the last axes of `full`, so that it can be repeated over the leading ones.
    #[must_use]
    pub fn is_suffix_of(&self, full: &Self) -> bool {
        full.0.ends_with(&self.0)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Self(dims.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(usize::to_string).collect();
        write!(f, "[{}]", dims.join(","))
    }
}

/// Element type and shape of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Shape,
}

impl TensorType {
    /// A type from its parts.
    #[must_use]
    pub fn new(dtype: DType, shape: impl Into<Shape>) -> Self {
        Self { dtype, shape: shape.into() }
    }

    /// Whether it takes at most [`MOST_BYTES`].
    #[must_use]
    pub fn fits(&self) -> bool {
        // Where an extent is 0, products of the others are still computed.
        let elements = self.shape.0.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
        elements.and_then(|n| n.checked_mul(self.dtype.size())).is_some_and(|n| n <= MOST_BYTES)
    }

    /// Size in bytes without gaps.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}
