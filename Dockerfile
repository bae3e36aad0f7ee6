# kd with CUDA-enabled torch from PyPI; runs on CPU as well.
#   docker build -t kd .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -e HOME=/work -v $PWD:/work kd cache-teachers photos --cache photos.kd --teacher …
FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/kd
ENV PATH=/opt/kd/bin:$PATH
COPY pyproject.toml README.md LICENSE ./
COPY kdcli ./kdcli
RUN pip install --no-cache-dir .

FROM python:3.12-slim
COPY --from=build /opt/kd /opt/kd
ENV PATH=/opt/kd/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home kd && install -d -o kd -g kd /work
USER kd
WORKDIR /work
RUN kd --version
ENTRYPOINT ["kd"]
