// Run an artifact on zeros and print the first values of each output.
//
//     c++ -std=c++17 -O2 -I HEADERS run_clip.cpp -o run_clip -ldl -lm -lpthread && ./run_clip ARTIFACT
#include <dance_model.h>

#include <cstring>
#include <iostream>

int main(int argc, char **argv) try {
  if (argc != 2) throw std::runtime_error("run_clip ARTIFACT");
  const std::string folder = argv[1], weights = folder + "/weights.safetensors";
  const dance_api *api = dance::open(folder + "/model.so");

  dance_options options{};
  options.size = sizeof options;
  options.weights_path = weights.c_str();
  dance::Model model(api, options);

  std::vector<std::vector<char>> given, answers;
  std::vector<const void *> from;
  std::vector<void *> to;
  for (const auto &tensor : model.inputs()) from.push_back(given.emplace_back(tensor.bytes).data());
  for (const auto &tensor : model.outputs()) to.push_back(answers.emplace_back(tensor.bytes).data());
  model.run(from, to);

  std::size_t place = 0;
  for (const auto &tensor : model.outputs()) {
    std::cout << tensor.name << ':';
    for (std::size_t each = 0; tensor.kind == DANCE_FLOAT && tensor.bits == 32 && each < 4 && each * 4 < tensor.bytes; each++) {
      float value;
      std::memcpy(&value, answers[place].data() + 4 * each, sizeof value);
      std::cout << ' ' << value;
    }
    std::cout << '\n';
    place++;
  }
} catch (const std::exception &error) {
  std::cerr << "error: " << error.what() << '\n';
  return 2;
}
