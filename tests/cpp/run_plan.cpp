// Runs a plan.bin without Python or torch: run_plan PLAN IMAGES COUNT THREADS RESULTS.
//
// IMAGES holds COUNT float32 images [channels, height, width]; RESULTS gets COUNT float32 results, laid out alike.
// Ends with 2, and says why, where the plan cannot be run.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/network.h"
#include "runtime/plan_file.h"

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

vpns::ImageTensor tensor(std::vector<float>& data, const vpns::PlanValue& value) {
  return {data.data(), vpns::DType::kF32, value.elements(), value.height * value.width, value.width, 1};
}

void run(char** arguments) {
  const vpns::PlanFile plan(arguments[1]);
  const std::vector<char> images = read_file(arguments[2]);
  const int64_t count = std::stoll(arguments[3]);
  const vpns::Network network(plan.data(), plan.size());
  const vpns::PlanValue &in = network.plan().values[network.plan().inputs[0]],
                        &out = network.plan().values[network.plan().outputs[0]];
  if (static_cast<int64_t>(images.size()) != count * in.elements() * 4)
    throw std::runtime_error("expected " + std::to_string(count * in.elements()) + " numbers as images");
  std::vector<float> x(count * in.elements()), y(count * out.elements());
  std::copy(images.begin(), images.end(), reinterpret_cast<char*>(x.data()));
  vpns::ExecutionContext context;
  network.run(context, {tensor(x, in)}, {tensor(y, out)}, count, std::stoi(arguments[4]));
  std::ofstream results(arguments[5], std::ios::binary);
  results.write(reinterpret_cast<const char*>(y.data()), static_cast<std::streamsize>(y.size() * 4));
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 6) throw std::runtime_error("usage: run_plan PLAN IMAGES COUNT THREADS RESULTS");
    run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
