"""Print the folder of the embedded model's safetensors, for engines that read only those."""

from benchmarks.prompts import safetensors_folder

if __name__ == "__main__":
    print(safetensors_folder())
