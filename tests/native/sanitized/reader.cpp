// Files with small faults under a right checksum, read from memory that ends where they end: a network that runs, or
// one clear refusal. Built with sanitizers by `make sanitize`, which runs it in the root of the repository.
#include <cctype>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "event/file/tensors.h"
#include "event/iirsnn.h"

namespace {

std::mt19937 draw(0);

size_t below(size_t limit) { return draw() % limit; }

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

size_t header_length(const std::string& content) {
  uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  return length;
}

// One fault in the header, whose length stands before it; or in the tensors, one time in eight.
std::string with_fault(std::string content) {
  static const char* const kValues[] = {"0",    "-1",   "2",  "65536", "2147483648", "9223372036854775807",
                                        "1e39", "null", "[]", "{}",    "\\\"\\\"",   "true",
                                        "0.5"};
  const uint64_t length = header_length(content);
  if (below(8) == 0) {
    content[8 + length + below(content.size() - 8 - length)] = char(draw());
    return content;
  }
  std::string header = content.substr(8, length);
  size_t at = below(header.size());
  switch (below(5)) {
    case 0:
      header[at] = char(draw());
      break;
    case 1:
      header.erase(at, 1 + below(8));
      break;
    case 2:
      header.insert(at, header, below(header.size()), below(64));
      break;
    default:  // another value in the place of a number
      while (at < header.size() && !std::isdigit(static_cast<unsigned char>(header[at]))) ++at;
      size_t end = at;
      while (end < header.size() && std::isdigit(static_cast<unsigned char>(header[end]))) ++end;
      header.replace(at, end - at, kValues[below(std::size(kValues))]);
  }
  uint64_t now = below(16) ? header.size() : draw();
  std::string made(8, '\0');
  std::memcpy(made.data(), &now, 8);
  return made + header + content.substr(8 + length);
}

void seal(std::string& content) {
  static const std::string kBefore = "\"crc32\":\"", kZeros = "00000000";
  const size_t found = content.find(kBefore), at = found + kBefore.size();
  if (found == content.npos || at + kZeros.size() > content.size()) return;
  content.replace(at, kZeros.size(), kZeros);
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", iirsnn::event::crc32(content));
  content.replace(at, kZeros.size(), digits);
}

// Whether it is a network; one of its own image size is run.
bool runs(const std::string& content, const iirsnn_facts& known) {
  const std::unique_ptr<char[]> exact(new char[content.size()]);
  std::memcpy(exact.get(), content.data(), content.size());
  iirsnn_network* network = nullptr;
  if (iirsnn_load_memory(exact.get(), content.size(), &network) != IIRSNN_OK) {
    if (!*iirsnn_message()) std::printf("a refusal without a message\n");
    return false;
  }
  iirsnn_facts facts;
  iirsnn_describe(network, &facts);
  if (facts.channels == known.channels && facts.height == known.height && facts.width == known.width &&
      facts.timesteps <= 4) {
    const std::vector<float> images(facts.channels * facts.height * facts.width, 0.5f);
    std::vector<float> logits(facts.classes);
    iirsnn_run(network, images.data(), 1, 2, logits.data(), nullptr);
  }
  iirsnn_release(network);
  return true;
}

}  // namespace

// With any argument: a short part.
int main(int arguments, char**) {
  const int cases = arguments == 1 ? 2000 : 200;
  int failures = 0;
  for (const char* name : {"fp32", "int8"}) {
    const std::string content = content_of(std::string("tests/event/files/format3-") + name + ".iirsnn");
    iirsnn_network* network = nullptr;
    if (content.empty() || iirsnn_load_memory(content.data(), content.size(), &network) != IIRSNN_OK) {
      std::fprintf(stderr, "FAILED: the file without a fault: %s\n", iirsnn_message());
      return 1;
    }
    iirsnn_facts facts;
    iirsnn_describe(network, &facts);
    iirsnn_release(network);
    int read = 0;
    for (int i = 0; i < cases; ++i) {
      std::string made = with_fault(content);
      seal(made);
      read += runs(made, facts);
    }
    for (size_t size = 1; size < content.size(); size += 26000 / cases) {
      std::string cut = content.substr(0, size);
      seal(cut);
      failures += runs(cut, facts);
    }
    std::fprintf(stderr, "reader: %d of %d changed files of %s are networks\n", read, cases, name);
    if (read == 0 || read > cases / 2 || failures) ++failures;
  }
  if (failures) std::fprintf(stderr, "FAILED: too many or too few were read\n");
  return failures ? 1 : 0;
}
