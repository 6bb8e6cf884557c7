// The loops of grouped.h for one vector length; included after channel_tiles.inl by each instruction set's own file.

// Groups<width> says how groups of that many channels are read.
template <template <int> typename Groups, typename X, typename Y>
void run_grouped(const GroupedPlan& plan, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  const float* const weights = plan.weights.data();
  const auto run = [&](auto width) {
    if (s.stride_h == 1) run_channel_tiles<Groups<width>, 3, 1, X, Y>(s, weights, call);
    else run_channel_tiles<Groups<width>, 3, 2, X, Y>(s, weights, call);
  };
  if (s.C / s.groups == 4) run(std::integral_constant<int, 4>{});
  else run(std::integral_constant<int, 8>{});
}
