//! The compiler: typed graph, autodiff, passes, memory plan, plan. No kernels.
