"""`python -m st_moe COMMAND` is `st_moe COMMAND`."""

from st_moe.main import run

if __name__ == '__main__':
  run()
