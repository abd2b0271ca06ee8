# docker build -t functional_lm .
# docker run --rm -v "$PWD/runs:/srv/runs" functional_lm pretrain --out runs/train
# docker run --rm -v "$PWD/runs:/srv/runs" -p 8000:8000 functional_lm api --model runs/train --host 0.0.0.0
FROM python:3.12-slim

# Inductor, torch's compiler, writes C++ and needs g++; the image's Python brings its own headers.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/functional_lm
COPY pyproject.toml setup.cfg constraints.txt README.md LICENSE ./
COPY functional_lm ./functional_lm
RUN pip install --no-cache-dir -c constraints.txt ".[serve]"

RUN useradd --create-home user && mkdir -p /srv/runs && chown -R user /srv
USER user
WORKDIR /srv
ENTRYPOINT ["python", "-m", "functional_lm"]
CMD ["--help"]
